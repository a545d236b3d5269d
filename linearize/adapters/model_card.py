"""Model cards of students: what they are, how to load them, and that plain diffusers runs them wrong."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from .hub import is_repository
from .manifest import Manifest, Trained

CARD_FILE = "README.md"
# names that the Hub accepts as `license:`; any other is "other", with its own name as `license_name:`
_HUB_LICENSES = (
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "bigscience-openrail-m"),
    *("bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("gpl-3.0", "agpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense"),
)


def adapter_card(manifest: Manifest, name: str) -> str:
    """The card of an adapter that is loaded by `name`."""
    warning = (
        "This is an adapter, not a model: diffusers alone cannot load it. Its weights were trained together with "
        f"{_methods(manifest)} and do not work with full attention."
    )
    return _card(manifest, name, warning=warning, relation="adapter")


def merged_card(manifest: Manifest, name: str) -> str:
    """The card of a whole pipeline with its trained weights merged, loaded by `name`."""
    return _card(manifest, name, warning=merged_warning(manifest), relation="finetune")


def merged_warning(manifest: Manifest) -> str:
    """The warning for whoever loads a merged folder."""
    return (
        "DO NOT LOAD WITH PLAIN DIFFUSERS: this model was trained with attention of linear cost, "
        f"{_methods(manifest)}, not with full attention. Plain diffusers loads it without an error, but runs full "
        "attention, which costs more and generates wrong images. Load it with lineardit.from_pretrained."
    )


def _card(manifest: Manifest, name: str, *, warning: str, relation: str) -> str:
    base = manifest.base
    on_hub = base is not None and is_repository(base)
    known = manifest.base_license in _HUB_LICENSES
    data = ModelCardData(
        library_name="lineardit",
        license=manifest.base_license if known else "other" if manifest.base_license else None,
        license_name=None if known or not manifest.base_license else _slug(manifest.base_license),
        license_link=f"https://huggingface.co/{base}" if on_hub and not known and manifest.base_license else None,
        base_model=base if on_hub else None,
        base_model_relation=relation if on_hub else None,
        tags=["lineardit", "linear-attention", "diffusers", *_names(manifest)],
    )
    needs_base = relation == "adapter" and not on_hub
    load = f'"{name}"' + (', base="FOLDER OR HUB ID OF THE BASE"' if needs_base else "")
    return f"""---
{data.to_yaml()}
---

# {name.rpartition("/")[2]}: {_base(manifest)} with linear-cost attention

> **{warning}**

## Load

```python
import lineardit
pipe = lineardit.from_pretrained({load})
image = pipe("a lighthouse at dawn").images[0]
```

## Details

| | |
| --- | --- |
| base | {_base(manifest)}{f" at revision {manifest.base_revision}" if manifest.base_revision else ""} |
| licence of the base | {manifest.base_license or "unknown: look it up before you use or share this model"} |
| model | {manifest.model_class}{f", family {manifest.family}" if manifest.family else ""} |
| method and settings | {_methods(manifest)}{_dense(manifest)} |
| modules | {", ".join(f"`{pattern}`" for pattern in manifest.methods)} |
| trained | {", ".join(map(_trained, manifest.trained)) or "only the method's own parameters"} |
| versions | {", ".join(f"{library} {version}" for library, version in manifest.versions.items())} |

Made with lineardit. The licence of the base applies to this derived model.
"""


def _base(manifest: Manifest) -> str:
    if manifest.base is None:
        return "a model created in memory"
    return manifest.base if is_repository(manifest.base) else f"a local folder, {Path(manifest.base).name}"


def _methods(manifest: Manifest) -> str:
    """`clear (radius 16)`, each kind once."""
    texts = []
    for entries in manifest.methods.values():
        values = [f"{key} {json.dumps(value)}" for key, value in entries.items() if key != "method"]
        texts.append(entries["method"] + (f" ({', '.join(values)})" if values else ""))
    return " and ".join(dict.fromkeys(texts))


def _dense(manifest: Manifest) -> str:
    """Where the original attention runs."""
    return f"; original attention below {manifest.dense_tokens:,} image tokens" if manifest.dense_tokens else ""


def _names(manifest: Manifest) -> list[str]:
    return sorted({entries["method"] for entries in manifest.methods.values()})


def _trained(trained: Trained) -> str:
    return f"LoRA of rank {trained.rank}, alpha {trained.alpha}" if trained.kind == "lora" else "full weights"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
