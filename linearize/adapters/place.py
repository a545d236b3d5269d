"""Where a base or an adapter is: a folder, a config file, or a repository of the Hub."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from .hub import fetch, is_repository, list_file_names

PIPELINE_FILE = "model_index.json"
CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder, a config file or a Hub repository, and how to get single files from it."""

    name: str
    folder: Path | None
    revision: str | None = None
    offline: bool = False

    def file(self, path: str) -> Path | None:
        """A file of the folder or repository; None if it has none of that name."""
        if self.folder is None:
            return fetch(self.name, path, revision=self.revision, offline=self.offline)
        file = self.folder / path
        return file if file.is_file() else None

    def names(self, path: str = "") -> list[str] | None:
        """Sorted names of the files in one of its folders; None: no such folder, or no list from the Hub."""
        if self.folder is None:
            return list_file_names(self.name, path, revision=self.revision, offline=self.offline)
        folder = self.folder / path
        return sorted(file.name for file in folder.iterdir()) if folder.is_dir() else None


def find_place(name: str | Path, *, revision: str | None = None, offline: bool = False) -> Place:
    """Find where a base or an adapter is; HF_HUB_OFFLINE=1 in the environment implies `offline`.

    Raises:
        ValueError: the name is neither an existing path nor of the form of a Hub id, a revision is given for a folder,
            or the path is not valid in this locale.
    """
    offline = offline or constants.HF_HUB_OFFLINE
    check_encodable(str(name))
    path = Path(name).expanduser()
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision is for Hub repositories, got {revision!r} for the folder {path}")
        return Place(name=str(path.resolve()), folder=path.resolve())
    if not is_repository(str(name)):
        raise ValueError(f"{name} is neither a local folder nor a Hub id, which has the form owner/name")
    return Place(name=str(name), folder=None, revision=revision, offline=offline)


def check_encodable(path: str) -> None:
    """Raise a ValueError for a path that this locale or UTF-8 cannot encode."""
    try:
        os.fsencode(path)
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        encoding = sys.getfilesystemencoding()
        raise ValueError(
            f"{path!a} cannot be encoded as {encoding}, which paths use here: set PYTHONUTF8=1, or rename it"
        ) from error
