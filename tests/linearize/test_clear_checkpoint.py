"""CLEAR's published checkpoints: its own outputs, and a FLUX forward with a dense mask written out here."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from golden_parts import golden_parts, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from impls import ALL
from lineardit import Clear, dense, linearize_, load_adapter_, restore_, save_adapter, set_impl_
from lineardit.cli import run as run_command
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.errors import UnsupportedModelError
from lineardit.linearize.importers import load_clear_checkpoint_
from tiny_models import build, position_ids, run

CASES = {"clear_flux_r4": None, "clear_flux_r4_down4": 4}  # file -> pool size
IMPLS = ALL


class Case:
    """A golden file: what the authors' code got and gave."""

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


@pytest.mark.parametrize("impl", IMPLS)
def test_load_clear_checkpoint_gives_the_authors_output(case: Case, impl: str) -> None:
    model = case.model()
    load_clear_checkpoint_(model, case.checkpoint, radius=case.radius, pool_size=case.pool_size)
    set_impl_(model, impl)
    assert relative_error(run(model, case.inputs), case.output) < 1e-4


class DenseMask:
    """FLUX's attention with CLEAR's mask written out pair by pair, in float64: an independent second opinion."""

    def __init__(self, grid: tuple[int, int], text_len: int, radius: float, cells: Tensor | None) -> None:
        self.grid, self.text_len, self.cells = grid, text_len, cells
        positions = torch.tensor([divmod(index, grid[1]) for index in range(grid[0] * grid[1])])
        near = (positions[:, None] - positions).square().sum(-1) < radius**2
        self.mask = torch.ones(text_len + len(near), text_len + len(near), dtype=torch.bool)
        self.mask[text_len:, text_len:] = near

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def heads(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (attn.heads, -1))

        query, key, value = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text = [heads(layer(encoder_hidden_states)) for layer in added]
            query = torch.cat([attn.norm_added_q(text[0]), query], 1)
            key = torch.cat([attn.norm_added_k(text[1]), key], 1)
            value = torch.cat([text[2], value], 1)
        query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in (query, key))
        out = self.attend(query.double(), key.double(), value.double()).flatten(2).to(hidden_states)
        if encoder_hidden_states is None:
            return out
        text_out, image_out = out[:, : self.text_len], out[:, self.text_len :]
        return attn.to_out[0](image_out), attn.to_add_out(text_out)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [B, N, H, D]
        mask, text_len = self.mask, self.text_len
        if self.cells is not None:
            key, value = (torch.cat([part, self.pooled(part[:, text_len:])], 1) for part in (key, value))
            seen = torch.zeros(len(mask), key.shape[1] - len(mask), dtype=torch.bool)
            seen[text_len:] = True
            mask = torch.cat([mask, seen], 1)
        logits = torch.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value)

    def pooled(self, tokens: Tensor) -> Tensor:  # [B, height * width, H, D] -> [B, cells, H, D]
        height, width = self.grid
        weight = self.cells.double()
        side = len(weight)
        sums = []
        for top in range(0, height, side):
            for left in range(0, width, side):
                inside = [(r, c) for r in range(side) for c in range(side) if top + r < height and left + c < width]
                share = weight.sum() / sum(weight[r, c] for r, c in inside)
                sums.append(
                    sum(weight[r, c] * tokens[:, (top + r) * width + left + c] for r, c in inside)
                    * (1 if len(inside) == side * side else share)
                )
        return torch.stack(sums, 1)


def dense_mask_output(case: Case, inputs: dict[str, Tensor], grid: tuple[int, int], radius: float) -> Tensor:
    model = case.model()
    weights = {key: tensor for key, tensor in case.checkpoint.items() if "spatial_weight" not in key}
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    for name, module in model.named_modules():
        if hasattr(module, "get_processor"):
            cells = case.checkpoint.get(f"{name}.processor.spatial_weight")
            cells = None if cells is None else cells.reshape(case.pool_size, case.pool_size)
            module.processor = DenseMask(grid, inputs["txt_ids"].shape[0], radius, cells)
    return run(model, inputs)


def inputs_at(case: Case, grid: tuple[int, int], text_len: int, batch: int) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(batch, grid[0] * grid[1], case.config["in_channels"]),
        "encoder_hidden_states": torch.randn(batch, text_len, case.config["joint_attention_dim"]),
        "pooled_projections": torch.randn(batch, case.config["pooled_projection_dim"]),
        "timestep": torch.rand(batch),
        "guidance": torch.full((batch,), 3.5),
        "img_ids": position_ids(grid),
        "txt_ids": torch.zeros(text_len, 3),
    }


def test_the_dense_mask_of_this_file_gives_the_authors_output(case: Case) -> None:
    output = dense_mask_output(case, case.inputs, tuple(case.grid), case.radius)
    assert relative_error(output, case.output) < 1e-4


SHAPES = [((13, 9), 7, 4, 2), ((8, 20), 512, 2.5, 1), ((17, 5), 1, 1, 2), ((9, 11), 20, 100, 2)]
# Triton's interpreter takes its time: there each shape is for one of the two checkpoints
AGREEING = [
    pytest.param(name, *shape, impl, marks=pytest.mark.slow if impl == "triton" and (index + number) % 2 else ())
    for number, name in enumerate(CASES)
    for index, shape in enumerate(SHAPES)
    for impl in IMPLS
]


@pytest.mark.parametrize(
    ("case", "grid", "text_len", "radius", "batch", "impl"),
    AGREEING,
    indirect=["case"],
    ids=lambda value: str(value).replace(", ", "x"),
)
def test_load_clear_checkpoint_agrees_with_a_dense_mask(case, grid, text_len, radius, batch, impl: str) -> None:
    inputs = inputs_at(case, grid, text_len, batch)
    model = case.model()
    load_clear_checkpoint_(model, case.checkpoint, radius=radius, pool_size=case.pool_size)
    set_impl_(model, impl)
    assert relative_error(run(model, inputs), dense_mask_output(case, inputs, grid, radius)) < 1e-4


def test_load_clear_checkpoint_keeps_the_way_back(case: Case) -> None:
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


def test_convert_base_imports_a_checkpoint_without_the_bases_weights(case: Case, tmp_path: Path) -> None:
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


def test_load_clear_checkpoint_says_which_pool_size_the_checkpoint_has(case: Case) -> None:
    for pool_size in {None, 2, 4} - {case.pool_size}:
        with pytest.raises(ValueError, match=f"pool_size must be .*, {case.pool_size}, got {pool_size}"):
            load_clear_checkpoint_(case.model(), case.checkpoint, radius=4, pool_size=pool_size)


def test_load_clear_checkpoint_is_for_flux() -> None:
    with pytest.raises(UnsupportedModelError, match="are for a FluxTransformer2DModel, got a SD3Transformer2DModel"):
        load_clear_checkpoint_(build("sd3"), {}, radius=4)
