"""Few globs for many module names, to save a conversion."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any


def grouped(labels: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[str]]:
    """Globs that match exactly the labelled modules, grouped by label and by name without numbers.

    Args:
        labels: Label by module name, such as the config of its method; labels are hashable.
        names: All names that the globs will be matched against; no glob matches a name without a label.
    Returns:
        {glob: names}. Numbers in names become `*`, as in "transformer_blocks.*.attn", unless another name would match.
    """
    groups: dict[tuple[str, Any], list[str]] = {}
    for name, label in labels.items():
        groups.setdefault((re.sub(r"(?<![^.])\d+(?![^.])", "*", name), label), []).append(name)
    found: dict[str, list[str]] = {}
    for (glob, _), members in groups.items():
        if [name for name in names if fnmatchcase(name, glob)] == [name for name in names if name in members]:
            found[glob] = members
        else:
            found |= {name: [name] for name in members}
    return found
