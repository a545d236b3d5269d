"""Students as one file, merged into a plain pipeline, and on the Hub."""

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import metadata_load
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_distill import build_tiny
from tiny_pipelines import plain, saved_flux_pipeline, student_of
from torch import Tensor

from lineardit import (
    Clear,
    dense,
    from_pretrained,
    linearize_,
    load_adapter_,
    push_to_hub,
    restore_,
    save_adapter,
    save_merged,
)
from lineardit.cli import run as run_command
from lineardit.linearize.adapters.hub import is_repository
from lineardit.linearize.adapters.manifest import MANIFEST_FILE, read_manifest
from lineardit.linearize.methods import RECOMMENDED
from tiny_models import build, inputs_of


def run(pipe: Any, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return getattr(pipe, "transformer", pipe)(**arguments)[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved_flux_pipeline(tmp_path / "base")


@pytest.fixture(params=["kernels", "lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_save_adapter_as_one_file_is_the_same_adapter(base: Path, kind: str, tmp_path: Path) -> None:
    student, arguments = student_of(base, kind), inputs_of("flux")
    assert save_adapter(student, tmp_path / "deep" / "x.safetensors") == tmp_path / "deep" / "x.safetensors"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x.safetensors"]
    pipe = plain(base)
    load_adapter_(pipe, tmp_path / "deep" / "x.safetensors")
    assert torch.equal(run(pipe, arguments), run(student, arguments))
    with dense(pipe):
        assert torch.equal(run(pipe, arguments), run(plain(base), arguments))
    again = from_pretrained(tmp_path / "deep" / "x.safetensors")
    assert torch.equal(run(again, arguments), run(student, arguments))


def test_save_adapter_as_one_file_writes_the_manifest_to_its_header(base: Path, tmp_path: Path) -> None:
    student = student_of(base, "lora")
    save_adapter(student, tmp_path / "folder")
    file = save_adapter(student, tmp_path / "x.safetensors")
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    assert header["family"] == "flux" and header["method"] == "clear" and header["base"] == str(base.resolve())
    assert all(entries == {"method": "clear", "radius": 2, "pool_size": 2} for entries in _methods(header))
    in_header, in_folder = (
        json.loads(header["lineardit"]),
        json.loads((tmp_path / "folder" / "lineardit.json").read_text()),
    )
    assert in_header == in_folder | {"tensors": None}
    assert read_manifest(file).base_license == "tiny-license"


def _methods(header: dict[str, str]) -> list[dict[str, Any]]:
    return list(json.loads(header["settings"]).values())


def test_save_adapter_as_one_file_without_tensors_can_be_loaded(tmp_path: Path) -> None:
    model = build("unet")
    linearize_(model, Clear(radius=2))
    save_adapter(model, tmp_path / "x.safetensors")
    other = build("unet")
    other.load_state_dict(model.state_dict())
    load_adapter_(other, tmp_path / "x.safetensors")
    arguments = inputs_of("unet")
    with torch.no_grad():
        assert torch.equal(other(**arguments)[0], model(**arguments)[0])


def test_save_adapter_overwrites_a_file_only_when_asked(base: Path, tmp_path: Path) -> None:
    student = student_of(base, "kernels")
    (tmp_path / "a.safetensors").write_text("mine")
    (tmp_path / "b.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"output file .*a.safetensors exists: .*overwrite=True"):
        save_adapter(student, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"must be a file, but .*b.safetensors is a folder"):
        save_adapter(student, tmp_path / "b.safetensors", overwrite=True)
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    save_adapter(student, tmp_path / "a.safetensors", overwrite=True)
    load_adapter_(plain(base), tmp_path / "a.safetensors")


def test_load_adapter_refuses_foreign_damaged_and_incomplete_files(base: Path, tmp_path: Path) -> None:
    save_file({"to_q.weight": torch.ones(2)}, tmp_path / "clear.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no 'lineardit' in its header, .*--import clear:FILE"):
        from_pretrained(tmp_path / "clear.safetensors")
    file = save_adapter(student_of(base, "lora"), tmp_path / "x.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"x.safetensors is damaged"):
        load_adapter_(plain(base), file)
    tensors = load_file(save_adapter(student_of(base, "lora"), tmp_path / "y.safetensors"))
    with safe_open(tmp_path / "y.safetensors", framework="pt") as opened:
        header = opened.metadata()
    save_file(dict(list(tensors.items())[1:]), tmp_path / "y.safetensors", metadata=header)
    with pytest.raises(ValueError, match="1 missing"):
        load_adapter_(plain(base), tmp_path / "y.safetensors")


def test_save_merged_loads_as_the_student(base: Path, kind: str, tmp_path: Path, caplog: Any) -> None:
    student, arguments = student_of(base, kind), inputs_of("flux")
    expected = run(student, arguments)
    save_merged(student, tmp_path / "merged")
    assert torch.equal(run(student, arguments), expected)
    with dense(student):
        assert torch.equal(run(student, arguments), run(plain(base), arguments))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lineardit"):
        pipe = from_pretrained(tmp_path / "merged")
    assert [record for record in caplog.records if record.name.startswith("lineardit")] == []
    assert torch.allclose(run(pipe, arguments), expected, atol=1e-5)
    if kind == "kernels":  # the base's own weights are all in the file
        restore_(pipe)
        assert torch.equal(run(pipe, arguments), run(plain(base), arguments))
    else:
        with pytest.raises(ValueError, match="originals"):
            restore_(pipe)


def test_save_merged_writes_a_plain_pipeline_with_a_warning(base: Path, tmp_path: Path) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    save_merged(student, tmp_path / "merged")
    names = set(load_file(tmp_path / "merged" / "transformer" / "diffusion_pytorch_model.safetensors"))
    assert {name for name in names if "linear_kernel" not in name} == set(plain(base).transformer.state_dict())
    entry = json.loads((tmp_path / "merged" / "transformer" / "config.json").read_text())["lineardit"]
    card = (tmp_path / "merged" / "README.md").read_text()
    for text in (entry["warning"], card):
        assert "DO NOT LOAD WITH PLAIN DIFFUSERS" in text and "clear (radius 2, pool_size 2)" in text
    dense_output = run(plain(tmp_path / "merged"), arguments)
    assert not torch.allclose(dense_output, run(student, arguments), atol=1e-3)
    with dense(student):
        assert not torch.allclose(dense_output, run(student, arguments), atol=1e-3)


def test_save_merged_takes_a_bare_denoiser_and_overwrites(tmp_path: Path) -> None:
    model, arguments = build("pixart"), inputs_of("pixart")
    linearize_(model, Clear(radius=2))
    save_merged(model, tmp_path / "merged")
    with pytest.raises(ValueError, match="exists"):
        save_merged(model, tmp_path / "merged")
    save_merged(model, tmp_path / "merged", overwrite=True)
    assert torch.equal(run(from_pretrained(tmp_path / "merged"), arguments), run(model, arguments))


def test_save_merged_of_a_merged_pipeline_writes_the_same_weights(base: Path, tmp_path: Path) -> None:
    save_merged(student_of(base, "lora"), tmp_path / "first")
    save_merged(from_pretrained(tmp_path / "first"), tmp_path / "second")
    first, second = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="originals"):
        restore_(from_pretrained(tmp_path / "second"))


def test_save_merged_refuses_unconverted_dense_and_user_lora_models(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not converted"):
        save_merged(plain(base), tmp_path / "out")
    student = student_of(base, "full")
    with dense(student), pytest.raises(ValueError, match=r"inside `with dense\(model\):`"):
        save_merged(student, tmp_path / "out")
    student.transformer.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="has an additional LoRA loaded"):
        save_merged(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_save_pretrained_after_fusing_lora_can_be_loaded(base: Path, tmp_path: Path) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    fused = from_pretrained(tmp_path / "adapter", keep_original=False)
    fused.save_pretrained(tmp_path / "saved")
    pipe = from_pretrained(tmp_path / "saved")
    assert torch.equal(run(pipe, arguments), run(fused, arguments))
    with pytest.raises(ValueError, match="originals"):
        restore_(pipe)


class FakeHub:
    """Stands in for the Hub and keeps what is uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.calls = folder, []
        api = huggingface_hub.HfApi
        monkeypatch.setattr(api, "create_repo", lambda _, *args, **options: self.calls.append((args, options)))
        monkeypatch.setattr(api, "upload_folder", lambda _, **options: self.upload(**options))

    def upload(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> None:
        assert is_repository(repo_id) and commit_message
        Path(folder_path).rename(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    return FakeHub(monkeypatch, tmp_path / "uploaded")


def test_push_to_hub_uploads_the_adapter_with_its_card(base: Path, hub: FakeHub, caplog: Any) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    with caplog.at_level(logging.WARNING, "lineardit"):
        assert push_to_hub(student, "me/flux-clear", private=True) == "https://huggingface.co/me/flux-clear"
    assert hub.calls == [(("me/flux-clear",), {"private": True, "exist_ok": True})]
    assert "must pass base=" in caplog.text  # this base is a folder
    assert {file.name for file in hub.folder.iterdir()} == {"README.md", "lineardit.json", "lineardit.safetensors"}
    assert torch.equal(run(from_pretrained(hub.folder), arguments), run(student, arguments))
    card = (hub.folder / "README.md").read_text()
    assert 'lineardit.from_pretrained("me/flux-clear", base=' in card
    for text in (
        "tiny-license",
        "clear (radius 2, pool_size 2)",
        "LoRA of rank 2",
        "family flux",
        "diffusers 0.",
        "base",
    ):
        assert text in card
    metadata = metadata_load(hub.folder / "README.md")
    assert metadata["license"] == "other" and metadata["license_name"] == "tiny-license"
    assert "clear" in metadata["tags"] and str(base) not in card


def test_push_to_hub_card_names_a_base_from_the_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineardit.linearize.adapters import base as bases

    source = bases.Source(name="owner/base", revision="abc123", license="apache-2.0")
    for module in ("adapter", "publishing"):
        monkeypatch.setattr(f"lineardit.linearize.adapters.{module}.source_of", lambda *_: source)
    model = build("unet")
    linearize_(model, Clear(radius=2))
    push_to_hub(model, "me/x")
    metadata, card = metadata_load(hub.folder / "README.md"), (hub.folder / "README.md").read_text()
    assert (metadata["license"], metadata["base_model"]) == ("apache-2.0", "owner/base")
    assert metadata["base_model_relation"] == "adapter"
    assert "owner/base at revision abc123" in card and 'lineardit.from_pretrained("me/x")' in card


def test_push_to_hub_uploads_a_merged_pipeline(base: Path, hub: FakeHub) -> None:
    student, arguments = student_of(base, "full"), inputs_of("flux")
    push_to_hub(student, "me/merged", merged=True)
    assert torch.equal(run(from_pretrained(hub.folder), arguments), run(student, arguments))
    card = (hub.folder / "README.md").read_text()
    assert "DO NOT LOAD WITH PLAIN DIFFUSERS" in card and 'lineardit.from_pretrained("me/merged")' in card


def test_push_to_hub_error_names_the_cause(base: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="repo_id must have the form owner/name, got 'mine'"):
        push_to_hub(student_of(base, "kernels"), "mine")
    with pytest.raises(ValueError, match="not converted"):
        push_to_hub(plain(base), "me/x")

    def refuse(api: Any, *args: Any, **options: Any) -> None:
        raise _forbidden()

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match="the Hub refused me/x: 403"):
        push_to_hub(student_of(base, "kernels"), "me/x")


@pytest.mark.parametrize("kind", [HfHubHTTPError.__bases__[0], ConnectionError])
def test_push_to_hub_reports_an_unreachable_hub(
    base: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", Mock(side_effect=kind("Name or service not known")))
    with pytest.raises(ValueError, match=r"the Hub cannot be reached: Name or service not known; .*save_adapter"):
        push_to_hub(student_of(base, "kernels"), "me/x")


def _forbidden() -> HfHubHTTPError:
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    Exception.__init__(error, "403 Forbidden")
    return error


def command(*words: str | Path) -> int:
    return run_command([str(word) for word in words])


def test_convert_writes_one_file_and_inspect_reads_it(base: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "x.safetensors"
    assert command("convert", base, "--method", "clear", "--radius", "3", "--offline", "-o", file) == 0
    assert {entries["radius"] for entries in read_manifest(file).methods.values()} == {3}
    assert command("inspect", file, "--offline") == 0
    assert "radius=3" in capsys.readouterr().out


def test_convert_repacks_an_adapter_without_its_base(base: Path, tmp_path: Path) -> None:
    folder = save_adapter(student_of(base, "lora"), tmp_path / "adapter")
    base.rename(tmp_path / "gone")
    assert command("convert", folder, "-o", tmp_path / "x.safetensors") == 0
    assert command("convert", tmp_path / "x.safetensors", "-o", tmp_path / "again") == 0
    assert (tmp_path / "again" / "lineardit.json").read_text() == (folder / "lineardit.json").read_text()


def test_convert_merges_an_adapter_or_a_base(base: Path, tmp_path: Path, capsys: Any) -> None:
    student, arguments = student_of(base, "lora"), inputs_of("flux")
    folder = save_adapter(student, tmp_path / "adapter")
    assert command("convert", folder, "--merge", "-o", tmp_path / "one") == 0
    assert torch.allclose(run(from_pretrained(tmp_path / "one"), arguments), run(student, arguments), atol=1e-5)
    options = ("--method", "clear", "--radius", "3", "--merge", "--dtype", "bfloat16")
    assert command("convert", base, *options, "-o", tmp_path / "two") == 0
    weights = load_file(tmp_path / "two" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    plain(base).to(torch.float16).save_pretrained(tmp_path / "half")
    assert command("convert", tmp_path / "half", *options[:-2], "-o", tmp_path / "three") == 0  # the stored dtype
    weights = load_file(tmp_path / "three" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize("from_adapter", [False, True])
def test_convert_merge_keeps_the_stored_dtype_of_every_part(tmp_path: Path, from_adapter: bool) -> None:
    pipe, base = build_tiny(), tmp_path / "base"
    pipe.transformer.to(torch.float16)
    pipe.text_encoder_2.to(torch.bfloat16)
    pipe.save_pretrained(base)
    name, options = base, ("--method", "clear", "--radius", "3")
    if from_adapter:
        assert command("convert", base, *options, "-o", tmp_path / "adapter") == 0
        name, options = tmp_path / "adapter", ()
    assert command("convert", name, *options, "--merge", "-o", tmp_path / "merged") == 0
    files = {file.relative_to(base) for file in base.rglob("*.safetensors")}
    assert len(files) == 4  # transformer, VAE and two text encoders
    for file in files:
        merged = load_file(tmp_path / "merged" / file)
        for weight_name, weight in load_file(base / file).items():
            assert merged[weight_name].dtype == weight.dtype
            assert torch.equal(merged[weight_name], weight), weight_name


def test_convert_defaults_to_the_recommended_hybrid(base: Path, tmp_path: Path) -> None:
    assert command("convert", base, "-o", tmp_path / "one") == 0
    assert set(read_manifest(tmp_path / "one" / MANIFEST_FILE).configs().values()) == {RECOMMENDED}
    assert command("convert", base, "--merge", "-o", tmp_path / "two") == 0
    model, other = from_pretrained(tmp_path / "two").transformer, plain(base).transformer
    report = linearize_(other)
    assert set(report.swapped.values()) == {RECOMMENDED}
    arguments = inputs_of("flux")
    assert torch.equal(run(model, arguments), run(other, arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["BASE", "--merge", "--method", "clear", "--radius", "2", "--dtype", "int3"], "dtype must be one of float32"),
        (["ADAPTER", "--method", "clear", "--radius", "2"], "is an adapter, which already has a method"),
        (["ADAPTER", "--merge", "--method", "clear", "--radius", "2"], "is an adapter, which already has a method"),
        (["FILE", "--method", "clear", "--radius", "2"], "is an adapter, which already has a method"),
        (["ADAPTER", "--layers", "x"], "layers of an adapter cannot be changed, got layers='x'"),
        (["ADAPTER", "--merge", "--min-tokens", "9"], "layers of an adapter cannot be changed"),
        (["ADAPTER", "--radius", "2"], "radius is a setting of a method: name the method with --method"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_convert_refuses_invalid_options_in_one_line(
    base: Path, tmp_path: Path, capsys: Any, arguments: list[str], expected: str
) -> None:
    student = student_of(base, "kernels")
    places = {
        "BASE": base,
        "ADAPTER": save_adapter(student, tmp_path / "adapter"),
        "FILE": save_adapter(student, tmp_path / "x.safetensors"),
    }
    capsys.readouterr()  # discard the progress bars of the saves above
    assert command("convert", *(places.get(word, word) for word in arguments), "-o", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_convert_merge_refuses_a_file_as_output(base: Path, tmp_path: Path, capsys: Any) -> None:
    options = ("--method", "clear", "--radius", "2", "--merge", "-o", tmp_path / "x.safetensors")
    assert command("convert", base, *options) == 2
    assert "a merged pipeline is a folder" in capsys.readouterr().err
