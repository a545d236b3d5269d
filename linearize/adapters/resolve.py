"""Resolve a name from config files only: an adapter with its base, a saved converted model, or a plain base."""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from .adapter import adapter_file
from .base import Base, read_base
from .config_entry import CONFIG_KEY
from .manifest import MANIFEST_FILE, Entry, Manifest, read_entry, read_manifest
from .place import Place, check_encodable, find_place


@dataclass(frozen=True, kw_only=True)
class ResolvedName:
    """What a folder, file or Hub id refers to.

    Attributes:
        place: Where it is stored.
        base: The model: the base of an adapter, otherwise the model itself.
        conversion: An adapter's manifest, or the entry of a saved converted model; None: a plain base.
    """

    place: Place
    base: Base
    conversion: Manifest | Entry | None

    def require_conversion(self) -> Manifest | Entry:
        """The conversion.

        Raises:
            ValueError: there is none; the error says what to type.
        """
        if self.conversion is not None:
            return self.conversion
        name, pipeline = self.place.name, self.base.source.pipeline_class
        also = (
            "; HighResolutionPipeline.from_pretrained and `lineardit generate` load it unconverted, with full attention"
        )
        raise ValueError(
            f"{name} is an unconverted base (it has no {MANIFEST_FILE}). Convert it in memory: "
            f"pipe = diffusers.{pipeline or self.base.model_class}.from_pretrained({name!r}); "
            f"lineardit.linearize_(pipe). Or `lineardit convert {quote(name)} -o DIR` writes an adapter, and "
            f"lineardit.from_pretrained('DIR') loads both{also if pipeline else ''}"
        )


def resolve_name(
    name: str | Path, *, base: str | Path | None = None, revision: str | None = None, offline: bool = False
) -> ResolvedName:
    """Resolve a name.

    Args:
        name: Folder, file or Hub id.
        base: Folder or Hub id to use in place of the base that an adapter names.
        revision: Branch, tag or commit of `name` on the Hub.
        offline: Do not access the network.
    Raises:
        ValueError: it or the base of an adapter is missing, unreachable or damaged, or `base` is given for something
            that is not an adapter.
    """
    place = find_place(name, revision=revision, offline=offline)
    file = adapter_file(place)
    if file is not None:
        manifest = read_manifest(file)
        found = _base_of(manifest, place.name, base, offline=offline)
        return ResolvedName(place=place, base=found, conversion=manifest)
    found = read_base(place.name, revision=revision, offline=offline)
    if base is not None:
        raise ValueError(f"base (--base) is for adapters only, but {place.name} is a complete model: omit it")
    entry = read_entry(found.config[CONFIG_KEY]) if CONFIG_KEY in found.config else None
    return ResolvedName(place=place, base=found, conversion=entry)


def _base_of(manifest: Manifest, adapter: str, base: str | Path | None, *, offline: bool) -> Base:
    if base is not None:
        return read_base(base, offline=offline)
    if manifest.base is None:
        raise ValueError(f"{adapter} does not name its base (it was made in memory): pass base= (--base)")
    check_encodable(manifest.base)
    if Path(manifest.base).is_absolute() and not Path(manifest.base).exists():
        raise ValueError(
            f"the base of {adapter} is no longer at {manifest.base}: pass its new location as base= (--base)"
        )
    return read_base(manifest.base, revision=manifest.base_revision, offline=offline)
