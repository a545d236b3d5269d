"""The license of a base, from its repository or folder."""

import logging
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import metadata_load

from .place import Place

logger = logging.getLogger(__name__)


def license_of(place: Place) -> str | None:
    """From the model card, or the first line of a LICENSE file; None: neither is there, or the Hub is unreachable."""
    if place.folder is not None and place.folder.is_file():
        return None
    try:
        return _license_in(place)
    except ValueError as error:  # a network failure here must not stop the caller
        logger.warning("the license of %s is unknown: %s", place.name, error)
        return None


def _license_in(place: Place) -> str | None:
    card = place.file("README.md")
    entries = _metadata(card) if card is not None else {}
    if isinstance(entries.get("license"), str):
        name = entries.get("license_name")
        return str(name) if entries["license"] == "other" and name else entries["license"]
    for name in ("LICENSE", "LICENSE.md", "LICENSE.txt"):
        if (file := place.file(name)) is not None:
            lines = [line.strip("# \t") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
            return next((line for line in lines if line), None)
    return None


def _metadata(card: Path) -> dict[str, Any]:
    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return {}  # a damaged card is not the model's fault
