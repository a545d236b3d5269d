"""Finding a base and reading its config files; no network."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny_pipelines import saved_flux_pipeline

from lineardit import Clear, linearize_, save_adapter
from lineardit.linearize.adapters import hub
from lineardit.linearize.adapters.base import build_on_meta, read_base, source_of
from lineardit.linearize.adapters.hub import fetch, is_repository, snapshot_of
from lineardit.linearize.adapters.opening import open_pipeline
from lineardit.linearize.adapters.place import find_place
from lineardit.linearize.adapters.stored_weights import stored_dtype
from lineardit.linearize.errors import UnsupportedModelError
from tiny_models import FAMILIES, build

FLUX_DEV = Path(__file__).parents[1] / "data" / "flux1-dev"


def test_read_base_reads_a_pipeline_folder(tmp_path: Path) -> None:
    folder = saved_flux_pipeline(tmp_path / "pipeline")
    base = read_base(folder)
    assert (base.source.name, base.source.revision) == (str(folder), None)
    assert (base.source.pipeline_class, base.source.license) == ("FluxPipeline", "tiny-license")
    assert (base.model_class, base.vae_scale) == ("FluxTransformer2DModel", 2)
    assert set(base.absent) >= {"text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"}


@pytest.mark.parametrize("location", ["transformer", "transformer/config.json"])
def test_read_base_reads_a_bare_denoiser(tmp_path: Path, location: str) -> None:
    base = read_base(saved_flux_pipeline(tmp_path / "pipeline") / location)
    assert (base.model_class, base.source.pipeline_class) == ("FluxTransformer2DModel", None)
    assert base.config["num_attention_heads"] == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_build_on_meta_matches_the_model_shapes_without_memory(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    shape = build_on_meta(read_base(tmp_path))
    assert all(tensor.is_meta for tensor in (*shape.parameters(), *shape.buffers()))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in shape.state_dict().items()} == expected


def test_source_of_finds_folder_and_license_of_a_loaded_model(tmp_path: Path) -> None:
    model = build("flux")
    assert source_of(model, model).name is None
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "LICENSE").write_text("\n# Some License 2.0\n\ntext")
    loaded = type(model).from_pretrained(tmp_path / "folder")
    source = source_of(loaded, loaded)
    assert (source.name, source.license) == (str(tmp_path / "folder"), "Some License 2.0")


def test_source_of_a_pipeline_is_the_source_of_its_denoiser(tmp_path: Path) -> None:
    folder, other = saved_flux_pipeline(tmp_path / "pipeline"), tmp_path / "denoiser"
    build("flux").save_pretrained(other)
    for model, location in [
        (FluxTransformer2DModel.from_pretrained(folder, subfolder="transformer"), folder),
        (FluxTransformer2DModel.from_pretrained(folder / "transformer"), folder),
        (FluxTransformer2DModel.from_pretrained(other), other),
        (build("flux"), None),
    ]:
        pipe = FluxPipeline.from_pretrained(folder, transformer=model, **dict.fromkeys(read_base(folder).absent))
        for one in (pipe, FluxPipeline(**pipe.components)):
            assert source_of(one, model).name == (location and str(location))


def test_source_of_a_hub_denoiser_is_the_cached_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    model = FluxTransformer2DModel.from_pretrained(saved_flux_pipeline(snapshot), subfolder="transformer")
    model.register_to_config(_name_or_path="some/model")  # as from_pretrained("some/model", subfolder="transformer")
    assert source_of(model, model).name is None

    def cached(_: str, file: str, *, local_files_only: bool, **__: object) -> str:
        assert local_files_only
        if not (snapshot / file).is_file():
            raise LocalEntryNotFoundError("")
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", cached)
    source = source_of(model, model)
    assert (source.name, source.revision, source.license) == ("some/model", "0123", "tiny-license")


def test_snapshot_of_parses_hub_cache_paths() -> None:
    path = Path("/cache/models--black-forest-labs--FLUX.1-dev/snapshots/abc/transformer/config.json")
    assert snapshot_of(path) == ("black-forest-labs/FLUX.1-dev", "abc")
    assert snapshot_of(Path("/models/flux/transformer")) is None


@pytest.mark.parametrize(
    ("name", "known"), [("owner/name", True), ("a.b/c-d_e.1", True), ("./a", False), ("/a/b", False), ("a/b/c", False)]
)
def test_is_repository_accepts_only_hub_ids(name: str, known: bool) -> None:
    assert is_repository(name) == known


def response(status: int) -> Any:
    return Mock(status_code=status, headers={})


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (GatedRepoError("", response=response(403)), "is gated: accept its terms at https://huggingface.co/some/model"),
        (RepositoryNotFoundError("", response=response(401)), "neither a local folder nor a public Hub repository"),
        (RevisionNotFoundError("", response=response(404)), "some/model has no revision 'v2'"),
        (LocalEntryNotFoundError(""), "cannot be reached and model_index.json of some/model at revision v2 is not in"),
        (
            HfHubHTTPError("busy", response=response(503)),
            "the Hub returned an error for some/model at revision v2: busy",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_fetch_error_names_the_cause(monkeypatch: pytest.MonkeyPatch, error: Exception, text: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=text) as caught:
        read_base("some/model", revision="v2")
    assert "\n" not in str(caught.value)


def test_fetch_logs_a_slow_hub(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    logged, messages = threading.Event(), list[str]()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())
            logged.set()

    def download(*_: object, **__: object) -> str:
        assert logged.wait(30)
        return "/file"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "PATIENCE", 0.01)
    monkeypatch.setattr(hub.logger, "handlers", [Handler()])
    with caplog.at_level(logging.INFO):
        assert hub.fetch("some/model", "config.json") == Path("/file")
    assert messages == ["waiting for the Hub: config.json of some/model"]


def test_from_pretrained_error_explains_a_path_outside_the_locale(tmp_path: Path) -> None:
    base = saved_flux_pipeline(tmp_path / "b\xe9" / "base")
    pipe = open_pipeline(base)
    linearize_(pipe, Clear(radius=2))
    save_adapter(pipe, tmp_path / "adapter")
    code = "import sys, lineardit; lineardit.from_pretrained(sys.argv[1])"
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C"}
    for source in (tmp_path / "adapter", base):
        result = subprocess.run(
            [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=False
        )
        assert "cannot be encoded as ascii, which paths use here: set PYTHONUTF8=1, or rename it" in result.stderr


def test_hf_hub_offline_uses_only_the_local_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    offline = []

    def download(*_: object, local_files_only: bool, **__: object) -> None:
        offline.append(local_files_only)
        raise LocalEntryNotFoundError("")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"not in the local cache, and offline=True \(--offline, HF_HUB_OFFLINE=1\)"):
        read_base("some/model")
    assert all(offline)


def test_read_base_tolerates_a_license_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    saved_flux_pipeline(snapshot)

    def download(_: str, file: str, **__: object) -> str:
        if file.endswith(".md") or file.startswith("LICENSE"):
            raise HfHubHTTPError("busy", response=response(503))
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert read_base("some/model").source.license is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtype_is_the_main_dtype_of_the_denoiser_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build("flux").to(dtype)
    model.proj_out.float()  # one small float32 layer does not change the main dtype
    model.save_pretrained(tmp_path)
    assert stored_dtype(read_base(tmp_path)) == dtype
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert stored_dtype(read_base(tmp_path / "parts")) == dtype


def test_fetch_returns_none_for_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise EntryNotFoundError("")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert fetch("some/model", "x.json") is None


def test_read_base_of_a_hub_id_fetches_config_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123"
    saved_flux_pipeline(snapshot)
    requests: list[tuple[str, str | None, bool]] = []

    def download(repository: str, file: str, *, revision: str | None, local_files_only: bool) -> str:
        requests.append((file, revision, local_files_only))
        if not (snapshot / file).is_file():
            raise EntryNotFoundError("")
        return str(snapshot / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    base = read_base("some/model", revision="main", offline=True)
    assert (base.source.name, base.source.revision, base.source.license) == ("some/model", "0123", "tiny-license")
    assert not [file for file, *_ in requests if file.endswith((".safetensors", ".bin"))]
    assert {(revision, offline) for _, revision, offline in requests} == {("main", True)}


def test_read_base_offline_refuses_a_model_not_in_the_cache() -> None:
    with pytest.raises(ValueError, match=r"some/model-that-is-not-here is not in the local cache, and offline"):
        read_base("some/model-that-is-not-here", offline=True)


def write(folder: Path, **files: object) -> Path:
    for name, entries in files.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(entries) if not isinstance(entries, str) else entries)
    return folder


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({}, "has no model_index.json or config.json"),
        ({"lineardit": {}}, "is an adapter, not a base"),
        ({"model_index": "{"}, "model_index.json is damaged"),
        ({"model_index": [1]}, "must hold a JSON object, got list"),
        ({"model_index": {"_class_name": "P", "vae": ["diffusers", "V"]}}, "has no transformer or unet"),
        ({"model_index": {"transformer": ["my_code", "Mine"]}}, "is a Mine from my_code; only classes from diffusers"),
        ({"model_index": {"transformer": ["diffusers", "X"]}}, "no transformer/config.json: the copy is incomplete"),
        ({"config": {"hidden_size": 3}}, "has no _class_name"),
    ],
)
def test_read_base_refuses_invalid_folders(tmp_path: Path, files: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_base(write(tmp_path, **files))


def test_find_place_refuses_a_missing_folder_and_a_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"./nowhere is neither a local folder nor a Hub id"):
        find_place("./nowhere")
    with pytest.raises(ValueError, match="revision is for Hub repositories, got 'v1'"):
        find_place(tmp_path, revision="v1")


def test_build_on_meta_error_lists_the_supported_classes(tmp_path: Path) -> None:
    base = read_base(write(tmp_path, config={"_class_name": "FluxTransformer3DModel"}))
    with pytest.raises(UnsupportedModelError, match=r"did you mean FluxTransformer2DModel.*; supported: .*UNet2DCond"):
        build_on_meta(base)


def test_build_on_meta_refuses_a_config_that_does_not_fit(tmp_path: Path) -> None:
    base = read_base(write(tmp_path, config={"_class_name": "FluxTransformer2DModel", "num_layers": "many"}))
    with pytest.raises(ValueError, match="does not fit a FluxTransformer2DModel"):
        build_on_meta(base)


def test_flux_dev_converts_in_seconds_and_in_under_2_gib(tmp_path: Path) -> None:
    script = f"""
import resource, time
from lineardit.linearize.adapters.conversion import convert_base
from lineardit import Clear
started = time.process_time()
report = convert_base({str(FLUX_DEV)!r}, Clear(radius=16, pool_size=4), output={str(tmp_path / "out")!r})
print(len(report.swapped), time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=FLUX_DEV.parents[2]
    )
    swapped, seconds, kib = run.stdout.split()[-3:]
    assert int(swapped) == 19 + 38
    assert float(seconds) < 30 and int(kib) < 2 * 2**20
    attention = json.loads((tmp_path / "out" / "lineardit.json").read_text())["attention"]
    assert attention == {
        "transformer_blocks.*.attn": {"24x128": 19},
        "single_transformer_blocks.*.attn": {"24x128": 38},
    }
