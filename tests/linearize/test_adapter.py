"""Adapters: writing, reading, and refusals."""

import json
import logging
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from trained import trained_

from lineardit import Clear, dense, linearize_, load_adapter_, restore_, save_adapter
from lineardit.linearize.convert import swapped
from tiny_models import FAMILIES, build, inputs_of, run

CLEAR = Clear(radius=2, pool_size=2)


def base(family: str = "flux") -> nn.Module:
    torch.manual_seed(1)
    return build(family)


def trained(kind: str, family: str = "flux") -> nn.Module:
    """A converted model with kernels and, by `kind`, LoRA or full projections, none at its initial value."""
    model = base(family)
    linearize_(model, CLEAR)
    trained_(model, kind, rank=3, alpha=2)
    return model


@pytest.mark.parametrize("kind", ["kernels", "lora", "full", "both"])
def test_load_adapter_reproduces_the_student_and_keeps_the_base(tmp_path: Path, kind: str) -> None:
    student, arguments = trained(kind), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    model = base()
    untouched = run(model, arguments)
    report = load_adapter_(model, tmp_path / "adapter")
    assert set(report.swapped) == set(swapped(student))
    assert torch.equal(run(model, arguments), run(student, arguments))
    with dense(model):
        assert torch.equal(run(model, arguments), untouched)
    assert torch.equal(run(model, arguments), run(student, arguments))
    restore_(model)
    assert torch.equal(run(model, arguments), untouched)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_adapter_round_trips_every_family(tmp_path: Path, family: str) -> None:
    names = trained("kernels", family).state_dict()
    attention = next(name.partition(".linear_kernel")[0] for name in names if ".linear_kernel." in name)
    projects = {f"{attention}.to_q.weight", f"{attention}.to_out.0.weight"} <= names.keys()
    student, arguments = trained("both" if projects else "kernels", family), inputs_of(family)
    save_adapter(student, tmp_path / "adapter")
    model = base(family)
    load_adapter_(model, tmp_path / "adapter")
    assert torch.equal(run(model, arguments), run(student, arguments))


@pytest.mark.parametrize("kind", ["kernels", "lora", "full", "both"])
def test_save_adapter_after_load_writes_the_same_bytes(tmp_path: Path, kind: str) -> None:
    save_adapter(trained(kind), tmp_path / "first")
    model = base()
    load_adapter_(model, tmp_path / "first")
    save_adapter(model, tmp_path / "second")
    for file in ("lineardit.json", "lineardit.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_save_adapter_leaves_out_a_user_lora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained("both")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name="style")
    save_adapter(model, tmp_path / "adapter")
    assert "a loaded LoRA is not part of the student and is not saved in the adapter" in caplog.text
    names = set(load_file(tmp_path / "adapter" / "lineardit.safetensors"))
    block = "single_transformer_blocks.0.attn."
    assert {name.removeprefix(block) for name in names if name.startswith(block)} == {
        "linear_kernel.pool_weight",
        "to_q.weight",
        "to_q.bias",
        *(f"{layer}.{factor}.weight" for layer in ("to_q", "to_k", "to_v") for factor in ("lora_A", "lora_B")),
    }


def test_load_adapter_works_with_a_user_lora_already_loaded(tmp_path: Path) -> None:
    student, arguments = trained("both"), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    model = base()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    load_adapter_(model, tmp_path / "adapter")
    assert not torch.equal(run(model, arguments), run(student, arguments))
    model.unload_lora()
    assert torch.equal(run(model, arguments), run(student, arguments))


def test_save_adapter_inside_dense_saves_the_student(tmp_path: Path) -> None:
    student = trained("full")
    save_adapter(student, tmp_path / "outside")
    with dense(student):
        save_adapter(student, tmp_path / "inside")
    outside, inside = (load_file(tmp_path / name / "lineardit.safetensors") for name in ("outside", "inside"))
    assert all(torch.equal(outside[name], inside[name]) for name in outside | inside)


def test_save_adapter_without_tensors_writes_only_the_json_file(tmp_path: Path) -> None:
    model = base()
    linearize_(model, {"transformer_blocks.*": Clear(radius=2), "single_*": Clear(radius=3.5)})
    save_adapter(model, tmp_path / "adapter")
    assert [file.name for file in (tmp_path / "adapter").iterdir()] == ["lineardit.json"]
    other, arguments = base(), inputs_of("flux")
    report = load_adapter_(other, tmp_path / "adapter")
    assert {config.radius for config in report.swapped.values()} == {2, 3.5}
    assert torch.equal(run(other, arguments), run(model, arguments))


def test_load_adapter_converts_only_the_saved_layers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = build("flux", num_layers=3)
    linearize_(model, Clear(radius=2), layers=["transformer_blocks.1.*", "single_*"])
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(1)
    report = load_adapter_(build("flux", num_layers=3), tmp_path / "adapter")
    assert set(report.swapped) == set(swapped(model)) and len(report.swapped) == 4


def test_load_adapter_replaces_an_earlier_adapter(tmp_path: Path) -> None:
    save_adapter(trained("both"), tmp_path / "one")
    torch.manual_seed(7)
    other = trained("lora")
    save_adapter(other, tmp_path / "two")
    model, arguments = base(), inputs_of("flux")
    untouched = run(model, arguments)
    load_adapter_(model, tmp_path / "one")
    load_adapter_(model, tmp_path / "two")
    assert torch.equal(run(model, arguments), run(other, arguments))
    restore_(model)
    assert torch.equal(run(model, arguments), untouched)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_load_adapter_without_originals_refuses_restore_and_dense(tmp_path: Path, kind: str) -> None:
    student, arguments = trained(kind), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    model = base()
    load_adapter_(model, tmp_path / "adapter", keep_original=False)
    loaded = run(model, arguments)
    torch.testing.assert_close(loaded, run(student, arguments), rtol=0, atol=1e-5)
    for undo in (restore_, lambda model: dense(model).__enter__()):
        with pytest.raises(ValueError, match="keep_original=True"):
            undo(model)
    assert torch.equal(run(model, arguments), loaded)
    save_adapter(model, tmp_path / "again")
    files = [tmp_path / name / "lineardit.safetensors" for name in ("adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_load_adapter_casts_to_the_base_dtype(tmp_path: Path) -> None:
    save_adapter(trained("both"), tmp_path / "adapter")
    model = base().to(torch.bfloat16)
    load_adapter_(model, tmp_path / "adapter")
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".linear_kernel." not in name} == {
        torch.bfloat16
    }


def test_save_adapter_overwrites_a_folder_only_when_asked(tmp_path: Path) -> None:
    save_adapter(trained("lora"), tmp_path / "adapter")
    before = (tmp_path / "adapter" / "lineardit.safetensors").read_bytes()
    with pytest.raises(ValueError, match="overwrite=True"):
        save_adapter(trained("full"), tmp_path / "adapter")
    assert (tmp_path / "adapter" / "lineardit.safetensors").read_bytes() == before
    save_adapter(trained("full"), tmp_path / "adapter", overwrite=True)
    assert (tmp_path / "adapter" / "lineardit.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_save_adapter_failure_leaves_no_partial_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("lora")
    save_adapter(model, tmp_path / "old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lineardit.linearize.adapters.adapter.save_file", fail)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space"):
            save_adapter(model, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    monkeypatch.undo()
    load_adapter_(base(), tmp_path / "old")


def test_save_adapter_refuses_an_unconverted_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="linearize_ first"):
        save_adapter(base(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def refused(folder: Path, model: nn.Module, text: str) -> None:
    """Loading fails with `text` and leaves the model unchanged."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=text) as caught:
        load_adapter_(model, folder)
    assert "\n" not in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: build("sd3"), "a FluxTransformer2DModel; this model is a SD3Transformer2DModel"),
        (lambda: build("flux", num_layers=2), r"transformer_blocks.\*.attn is 1 of 2x16 .*this model's is 2 of 2x16"),
    ],
)
def test_load_adapter_error_names_how_the_base_differs(tmp_path: Path, model, text: str) -> None:
    save_adapter(trained("both"), tmp_path / "adapter")
    refused(tmp_path / "adapter", model(), text)


def test_load_adapter_error_names_a_different_head_count(tmp_path: Path) -> None:
    save_adapter(trained("kernels"), tmp_path / "adapter")
    wide = type(base()).from_config({**base().config, "num_attention_heads": 4})
    refused(tmp_path / "adapter", wide, r"1 of 2x16 \(heads x head_dim\); this model's is 1 of 4x16")


def test_load_adapter_failure_keeps_an_earlier_conversion(tmp_path: Path) -> None:
    save_adapter(trained("both"), tmp_path / "adapter")
    (tmp_path / "adapter" / "lineardit.safetensors").unlink()
    model, arguments = base(), inputs_of("flux")
    linearize_(model, Clear(radius=3))
    before = run(model, arguments)
    refused(tmp_path / "adapter", model, r"is missing lineardit.safetensors")
    assert torch.equal(run(model, arguments), before)


def test_load_adapter_refuses_a_truncated_or_altered_tensors_file(tmp_path: Path) -> None:
    folder = save_adapter(trained("both"), tmp_path / "adapter")
    file = folder / "lineardit.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-7])
    refused(folder, base(), r"lineardit.safetensors has .* bytes.*truncated.*copy both files again")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(folder, base(), r"sha256 differs")


def test_load_adapter_refuses_a_file_that_is_not_safetensors(tmp_path: Path) -> None:
    folder = save_adapter(trained("both"), tmp_path / "adapter")
    (folder / "lineardit.safetensors").write_bytes(b"\x80\x04pickle")
    rewrite_tensors_entry(folder)
    refused(folder, base(), r"damaged or not a safetensors file")


def rewrite_tensors_entry(folder: Path) -> None:
    """Update the size and hash in the JSON to match the edited tensors file."""
    from lineardit.linearize.folders import sha256

    entries, file = json.loads((folder / "lineardit.json").read_text()), folder / "lineardit.safetensors"
    entries["tensors"] |= {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / "lineardit.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda tensors: tensors.pop("transformer_blocks.0.attn.linear_kernel.pool_weight"),
            "1 missing: .*pool_weight",
        ),
        (lambda tensors: tensors.pop("transformer_blocks.0.attn.to_q.lora_B.weight"), "1 missing: .*to_q.lora_B"),
        (lambda tensors: tensors.update({"x.y": torch.ones(1)}), "1 not in this model: x.y"),
        (
            lambda tensors: tensors.update({"transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2)}),
            r"1 of another shape: transformer_blocks.0.attn.to_q.weight is \[2, 2\], the model's is \[32, 32\]",
        ),
        (
            lambda tensors: tensors.update({"transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 32)}),
            r"1 of another shape: .*lora_A.weight is \[4, 32\], the model's is \[3, 32\]",
        ),
    ],
)
def test_load_adapter_lists_tensors_that_do_not_fit(tmp_path: Path, change, text: str) -> None:
    folder = save_adapter(trained("both"), tmp_path / "adapter")
    tensors = load_file(folder / "lineardit.safetensors")
    change(tensors)
    save_file(tensors, folder / "lineardit.safetensors")
    rewrite_tensors_entry(folder)
    refused(folder, base(), text)


def test_load_adapter_warns_about_a_different_base_revision(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = tmp_path / "models--somebody--tiny" / "snapshots"
    model = base()
    model.save_pretrained(snapshots / "aaaa")
    model.save_pretrained(snapshots / "bbbb")
    linearize_(old := type(model).from_pretrained(snapshots / "aaaa"), CLEAR)
    save_adapter(old, tmp_path / "adapter")
    entries = json.loads((tmp_path / "adapter" / "lineardit.json").read_text())
    assert (entries["base"], entries["base_revision"]) == ("somebody/tiny", "aaaa")
    with caplog.at_level(logging.WARNING, "lineardit"):
        load_adapter_(type(model).from_pretrained(snapshots / "aaaa"), tmp_path / "adapter")
        assert not caplog.records
        load_adapter_(type(model).from_pretrained(snapshots / "bbbb"), tmp_path / "adapter")
    (warning,) = caplog.messages
    assert "revision aaaa of somebody/tiny, but this pipeline is revision bbbb" in warning


@pytest.mark.parametrize("keep_original", [True, False])
def test_load_adapter_refuses_to_change_quantized_or_offloaded_weights(tmp_path: Path, keep_original: bool) -> None:
    save_adapter(trained("lora" if not keep_original else "full"), tmp_path / "adapter")
    model = base()
    layer = model.transformer_blocks[0].attn.to_q
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating point of 16 bits or more .*int8: quantized bases support LoRA"):
        load_adapter_(model, tmp_path / "adapter", keep_original=keep_original)
    assert not swapped(model)
    model = base()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="before enabling offload"):
        load_adapter_(model, tmp_path / "adapter", keep_original=keep_original)
    assert not swapped(model)


@pytest.mark.parametrize(("kind", "offload"), [("lora", "sequential"), ("lora", "group"), ("full", "group")])
def test_load_adapter_works_after_offloading(tmp_path: Path, kind: str, offload: str) -> None:
    student, arguments = trained(kind), inputs_of("flux")
    save_adapter(student, tmp_path / "adapter")
    model, cpu = base(), torch.device("cpu")
    untouched = run(model, arguments)
    if offload == "sequential":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    load_adapter_(model, tmp_path / "adapter")
    assert torch.equal(run(model, arguments), run(student, arguments))
    with dense(model):
        assert torch.equal(run(model, arguments), untouched)
    restore_(model)
    assert torch.equal(run(model, arguments), untouched)
