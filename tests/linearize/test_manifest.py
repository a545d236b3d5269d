"""lineardit.json: what is accepted and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from lineardit.linearize.adapters.manifest import (
    MANIFEST_FILE,
    Manifest,
    TensorsFile,
    Trained,
    read_entry,
    read_manifest,
)

MANIFEST = Manifest(
    base="somebody/model",
    base_revision="abc",
    base_license="apache-2.0",
    pipeline_class="FluxPipeline",
    model_class="FluxTransformer2DModel",
    attention={"transformer_blocks.*.attn": {"24x128": 19}},
    methods={"transformer_blocks.*.attn": {"method": "clear", "radius": 16}},
    trained=(Trained(kind="full"), Trained(kind="lora", rank=4, alpha=8.0)),
    tensors=TensorsFile(file="lineardit.safetensors", bytes=12, sha256="00"),
    versions={"lineardit": "0.1"},
)


def written(folder: Path, text: str) -> Path:
    path = folder / MANIFEST_FILE
    path.write_text(text)
    return path


def edited(**changes: Any) -> str:
    entries = json.loads(MANIFEST.to_json())
    for key, value in changes.items():
        if value is ...:
            del entries[key]
        else:
            entries[key] = value
    return json.dumps(entries)


def test_read_manifest_returns_what_was_written(tmp_path: Path) -> None:
    assert read_manifest(written(tmp_path, MANIFEST.to_json())) == MANIFEST


LORA = {"kind": "lora", "rank": 4, "alpha": 8.0}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 2}, "format_version must be 1, got 2.*update lineardit"),
        ({"format_version": ...}, "format_version must be 1, got None"),
        ({"metods": {}}, r"unknown key 'metods' in the file \(did you mean methods\?\); known keys: "),
        ({"model_class": ...}, "the file lacks model_class"),
        ({"model_class": 3}, "model_class must be of type str, got 3"),
        ({"base": 3}, "base must be of type str or null, got 3"),
        ({"attention": []}, r"attention must be of type dict, got \[\]"),
        ({"attention": {"a": {"2x16": True}}}, "attention.a.2x16 must be of type int, got True"),
        ({"attention": {"other": {"24x128": 19}}}, "methods and attention must name the same patterns"),
        ({"methods": {"transformer_blocks.*.attn": {"method": "cleer", "radius": 1}}}, "did you mean clear"),
        ({"methods": {"transformer_blocks.*.attn": {"method": "clear", "radus": 1}}}, "did you mean radius"),
        ({"methods": {"transformer_blocks.*.attn": {"method": "clear", "radius": -1}}}, "radius must be > 0"),
        ({"dense_below": -1}, "dense_below must be an integer >= 0, got -1"),
        ({"dense_below": None}, "dense_below must be an integer >= 0, got None"),
        ({"trained": [{**LORA, "rnk": 1}]}, "unknown key 'rnk' in trained .did you mean rank"),
        ({"trained": [{**LORA, "kind": "dora"}]}, "trained.kind must be 'lora' or 'full', got 'dora'"),
        ({"trained": [{**LORA, "rank": 0}]}, "needs rank >= 1"),
        ({"trained": [{**LORA, "alpha": float("nan")}]}, "a finite alpha, got 4 and nan"),
        ({"trained": [LORA, LORA]}, "each kind once"),
        ({"tensors": {"file": "../x.safetensors", "bytes": 1, "sha256": "0"}}, "tensors.file must be 'lineardit.safe"),
        ({"tensors": {"file": "lineardit.safetensors", "bytes": 1}}, "tensors lacks sha256"),
    ],
)
def test_read_manifest_error_names_the_invalid_entry(tmp_path: Path, changes: dict, text: str) -> None:
    path = written(tmp_path, edited(**changes))
    with pytest.raises(ValueError, match=text) as caught:
        read_manifest(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", MANIFEST.to_json()[:-9], "[1]", "\x00\xff"])
def test_read_manifest_refuses_a_damaged_file(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=r"damaged|must be of type dict"):
        read_manifest(path)


def test_read_manifest_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: pass an adapter folder written by"):
        read_manifest(tmp_path / MANIFEST_FILE)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (3, "lineardit must be of type dict, got 3"),
        ({"methods": {}, "trained": [], "changd": []}, "unknown key 'changd' in lineardit .did you mean changed"),
        ({"methods": [], "trained": [], "changed": []}, "lineardit.methods must be of type dict, got \\[\\]"),
        ({"trained": [], "changed": []}, "lineardit lacks methods"),
        ({"methods": {}, "trained": [], "changed": [], "dense_below": "9"}, "lineardit.dense_below must be an integer"),
    ],
)
def test_read_entry_error_names_the_invalid_entry(entry: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_entry(entry)
