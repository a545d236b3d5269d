"""How long what windows keep on the device lives: as long as any converted model."""

import weakref
from typing import Any

from ...kernels.pieces.kept_tables import release_tables

_USERS: "weakref.WeakSet[Any]" = weakref.WeakSet()


def keep_tables_for(user: Any) -> None:
    """Free the tables when this and every other user is gone."""
    _USERS.add(user)
    weakref.finalize(user, _release_if_last).atexit = False


def _release_if_last() -> None:
    if next(iter(_USERS), None) is None:  # len counts the one that has just gone
        release_tables()
