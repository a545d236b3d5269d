"""CLEAR's published checkpoints: outputs of the authors' code, restoring, adapters, and refusals."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from golden_parts import golden_parts, relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from impls import ALL
from lineardit import Clear, dense, linearize_, load_adapter_, restore_, save_adapter, set_impl_
from lineardit.cli import run as run_command
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.errors import UnsupportedModelError
from lineardit.linearize.importers import load_clear_checkpoint_
from tiny_models import build, run

CASES = {"clear_flux_r4": None, "clear_flux_r4_down4": 4}  # file -> pool size


class Case:
    """A golden file: inputs and outputs of the authors' code."""

    def __init__(self, name: str) -> None:
        metadata, parts = golden_parts(name)
        self.config, self.grid, self.radius = (json.loads(metadata[key]) for key in ("config", "grid", "radius"))
        self.base, self.checkpoint, self.inputs = parts["base"], parts["checkpoint"], parts["input"]
        self.output = parts["output"]["sample"]
        self.pool_size = CASES[name]

    def model(self) -> nn.Module:
        model = diffusers.FluxTransformer2DModel(**self.config)
        model.load_state_dict(self.base)
        return model.eval()


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("impl", ALL)
def test_load_clear_checkpoint_reproduces_the_authors_output(case: Case, impl: str) -> None:
    model = case.model()
    load_clear_checkpoint_(model, case.checkpoint, radius=case.radius, pool_size=case.pool_size)
    set_impl_(model, impl)
    assert relative_error(run(model, case.inputs), case.output) < 1e-4


def test_load_clear_checkpoint_can_be_undone_if_originals_are_kept(case: Case) -> None:
    model = case.model()
    before = run(model, case.inputs)
    load_clear_checkpoint_(model, case.checkpoint, radius=case.radius, pool_size=case.pool_size)
    with dense(model):
        assert torch.equal(run(model, case.inputs), before)
    load_clear_checkpoint_(model, case.checkpoint, radius=case.radius, pool_size=case.pool_size)
    restore_(model)
    assert torch.equal(run(model, case.inputs), before)
    load_clear_checkpoint_(model, case.checkpoint, radius=case.radius, pool_size=case.pool_size, keep_original=False)
    with pytest.raises(ValueError, match="originals"):
        restore_(model)


def test_load_clear_checkpoint_reads_files_and_saves_as_an_adapter(case: Case, tmp_path: Path) -> None:
    save_file(case.checkpoint, tmp_path / "clear_local.safetensors")
    model = case.model()
    load_clear_checkpoint_(model, tmp_path / "clear_local.safetensors", radius=case.radius, pool_size=case.pool_size)
    save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "lineardit.safetensors")
    weights = {key: tensor for key, tensor in case.checkpoint.items() if "spatial_weight" not in key}
    assert all(torch.equal(saved.pop(key), tensor) for key, tensor in weights.items())
    assert len(saved) == len(case.checkpoint) - len(weights)


def test_convert_base_imports_a_checkpoint_without_base_weights(case: Case, tmp_path: Path) -> None:
    model = case.model()
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "diffusion_pytorch_model.safetensors").unlink()
    save_file(case.checkpoint, tmp_path / "file.safetensors")
    convert_base(
        tmp_path / "base",
        Clear(radius=case.radius, pool_size=case.pool_size),
        output=tmp_path / "adapter",
        importer=f"clear:{tmp_path / 'file.safetensors'}",
    )
    load_adapter_(model, tmp_path / "adapter")
    assert relative_error(run(model, case.inputs), case.output) < 1e-4


@pytest.mark.parametrize(("radius", "pool_size"), [(32, None), (16, None), (8, None), (16, 4), (8, 4)])
def test_convert_imports_each_of_the_five_published_checkpoints(tmp_path: Path, radius: int, pool_size) -> None:
    case = Case("clear_flux_r4" if pool_size is None else "clear_flux_r4_down4")
    case.model().save_config(tmp_path / "base")
    file = tmp_path / f"clear_local_{radius}{'' if pool_size is None else f'_down_{pool_size}'}.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in case.checkpoint.items()}, file)
    options = ["--radius", str(radius), *([] if pool_size is None else ["--pool-size", str(pool_size)])]
    words = ["convert", str(tmp_path / "base"), "--method", "clear", *options, "--import", f"clear:{file}", "--offline"]
    assert run_command([*words, "-o", str(tmp_path / "x.safetensors")]) == 0
    model = case.model()
    report = load_adapter_(model, tmp_path / "x.safetensors")
    assert set(report.swapped.values()) == {Clear(radius=radius, pool_size=pool_size)}
    name = "transformer_blocks.0.attn.to_out.0.weight"
    assert torch.equal(model.get_parameter(name), case.checkpoint[name].bfloat16().float())


KEY = "single_transformer_blocks.1.attn.to_k.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(KEY), f"1 missing: {KEY}"),
        (lambda tensors: tensors.update(more=torch.ones(1)), "1 not in this model: more"),
        (lambda tensors: tensors.update({KEY: torch.ones(3)}), rf"{KEY} is \[3\], the model's is \[32\]"),
    ],
)
def test_load_clear_checkpoint_lists_wrong_keys_and_changes_nothing(case: Case, change, text: str) -> None:
    tensors = copy.copy(case.checkpoint)
    change(tensors)
    model = case.model()
    linearize_(model, Clear(radius=3))
    before = run(model, case.inputs)
    with pytest.raises(ValueError, match=text):
        load_clear_checkpoint_(model, tensors, radius=4, pool_size=case.pool_size)
    assert torch.equal(run(model, case.inputs), before)


def test_load_clear_checkpoint_error_names_the_checkpoint_pool_size(case: Case) -> None:
    for pool_size in {None, 2, 4} - {case.pool_size}:
        with pytest.raises(ValueError, match=f"pool_size must be {case.pool_size}, .*, got {pool_size}"):
            load_clear_checkpoint_(case.model(), case.checkpoint, radius=4, pool_size=pool_size)


def test_load_clear_checkpoint_refuses_models_other_than_flux() -> None:
    with pytest.raises(UnsupportedModelError, match="are for a FluxTransformer2DModel, got a SD3Transformer2DModel"):
        load_clear_checkpoint_(build("sd3"), {}, radius=4)
