"""LinFusion's published checkpoints, against the authors' outputs and a UNet with the formula written out here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from golden_parts import golden_parts, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from lineardit import Clear, LinFusion, dense, linearize_, load_adapter_, restore_, save_adapter
from lineardit.cli import run as run_command
from lineardit.linearize.adapters.conversion import convert_base
from lineardit.linearize.errors import UnsupportedModelError
from lineardit.linearize.importers import load_linfusion_checkpoint_
from tiny_models import build, run

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Case:
    """The golden file: inputs and outputs of the authors' code."""

    def __init__(self) -> None:
        metadata, parts = golden_parts("linfusion_unet")
        self.config = json.loads(metadata["config"])
        self.modules = json.loads(metadata["checkpoint_config"])["modules_list"]
        self.base, self.tensors, self.inputs = parts["base"], parts["checkpoint"], parts["input"]
        self.output = parts["output"]["sample"]

    def unet(self) -> nn.Module:
        unet = diffusers.UNet2DConditionModel(**self.config)
        unet.load_state_dict(self.base)
        return unet.eval()

    def folder(self, path: Path) -> Path:
        """The checkpoint in the authors' published form."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps({"_class_name": "LinFusion", "modules_list": self.modules}))
        save_file(self.tensors, path / WEIGHTS)
        return path


@pytest.fixture
def case() -> Case:
    return Case()


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    return case.folder(tmp_path / "linfusion")


def test_load_linfusion_checkpoint_reproduces_the_authors_output(case: Case, folder: Path) -> None:
    unet = case.unet()
    report = load_linfusion_checkpoint_(unet, folder)
    assert set(report.swapped.values()) == {LinFusion()} and len(report.swapped) == 4
    assert relative_error(run(unet, case.inputs), case.output) < 1e-4


class WrittenOut:
    """A UNet's self-attention by the paper, pair by pair in float64, with one module's tensors of a checkpoint."""

    def __init__(self, tensors: dict[str, Tensor], heads: int) -> None:
        self.tensors = {name: tensor.double() for name, tensor in tensors.items()}
        self.heads = heads

    def layer(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def term(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.0.weight" not in self.tensors:
            return x
        hidden = self.layer(f"{name}.0", x)
        norm = self.tensors[f"{name}.1.weight"], self.tensors[f"{name}.1.bias"]
        return self.layer(f"{name}.3", functional.leaky_relu(functional.layer_norm(hidden, norm[0].shape, *norm)))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        x = hidden_states.double()
        inputs = {"to_q": x + self.term("to_q_", x), "to_k": x + self.term("to_k_", x), "to_v": x}
        query, key, value = (self.layer(name, x).unflatten(-1, (self.heads, -1)) for name, x in inputs.items())
        query, key = functional.elu(query) + 1, functional.elu(key) + 1
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key) / x.shape[1]
        out = torch.einsum("bhqk,bkhd->bhqd", weights, value) / (weights.sum(-1, keepdim=True) + 1e-4)
        return self.layer("to_out.0", out.transpose(1, 2).flatten(2)).to(hidden_states)


def written_out(case: Case, inputs: dict[str, Any]) -> Tensor:
    unet = case.unet()
    for index, module in enumerate(case.modules):
        start = f"{index}."
        tensors = {name.removeprefix(start): x for name, x in case.tensors.items() if name.startswith(start)}
        unet.get_submodule(module["module_name"]).processor = WrittenOut(tensors, module["heads"])
    return run(unet, inputs)


def test_written_out_formula_reproduces_the_authors_output(case: Case) -> None:
    assert relative_error(written_out(case, case.inputs), case.output) < 1e-4


def other_networks(case: Case, hidden: list[int]) -> None:
    """Give the checkpoint networks of other widths; -1 removes them."""
    for index, (module, width) in enumerate(zip(case.modules, hidden, strict=True)):
        module["projection_mid_dim"] = width
        for name in [name for name in case.tensors if name.startswith((f"{index}.to_q_.", f"{index}.to_k_."))]:
            del case.tensors[name]
        if width == -1:
            continue
        channels = module["dim_n"]
        for term in ("to_q_", "to_k_"):
            network = nn.Sequential(
                nn.Linear(channels, width), nn.LayerNorm(width), nn.LeakyReLU(), nn.Linear(width, channels)
            )
            case.tensors |= {f"{index}.{term}.{key}": x for key, x in network.state_dict().items()}


@pytest.mark.parametrize("hidden", [[24] * 4, [-1] * 4, [32, 8, -1, 40]], ids=str)
def test_load_linfusion_checkpoint_takes_networks_of_other_widths(case: Case, tmp_path: Path, hidden) -> None:
    other_networks(case, hidden)
    unet, inputs = case.unet(), case.inputs | {"sample": torch.randn(2, 4, 10, 14)}
    load_linfusion_checkpoint_(unet, case.folder(tmp_path / "folder"))
    assert relative_error(run(unet, inputs), written_out(case, inputs)) < 1e-4


def test_load_linfusion_checkpoint_converts_only_the_listed_modules(case: Case, tmp_path: Path) -> None:
    case.modules = case.modules[:2]
    case.tensors = {name: x for name, x in case.tensors.items() if name[0] in "01"}
    unet = case.unet()
    report = load_linfusion_checkpoint_(unet, case.folder(tmp_path / "folder"))
    assert set(report.swapped) == {module["module_name"] for module in case.modules}
    assert relative_error(run(unet, case.inputs), written_out(case, case.inputs)) < 1e-4


def published_for(unet: nn.Module) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A checkpoint with random weights, in the authors' published form for a UNet."""
    modules, tensors = [], {}
    for name, attention in unet.named_modules():
        if not name.endswith("attn1"):
            continue
        channels = attention.to_q.out_features
        entry = {"module_name": name, "dim_n": channels, "heads": attention.heads, "projection_mid_dim": None}
        parts = {layer: attention.get_submodule(layer) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
        for term in ("to_q_", "to_k_"):
            parts[term] = nn.Sequential(
                nn.Linear(channels, channels), nn.LayerNorm(channels), nn.LeakyReLU(), nn.Linear(channels, channels)
            )
        for part, layer in parts.items():
            for key, tensor in layer.state_dict().items():
                tensors[f"{len(modules)}.{part}.{key}"] = tensor + torch.randn_like(tensor) * 0.1
        modules.append(entry)
    return modules, tensors


SD21 = {"attention_head_dim": [1, 4], "use_linear_projection": True, "upcast_attention": True}
SDXL = {
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}


@pytest.mark.parametrize("changes", [SD21, SDXL], ids=["sd21", "sdxl"])
def test_load_linfusion_checkpoint_supports_other_unets(case: Case, tmp_path: Path, changes: dict[str, Any]) -> None:
    case.config |= changes
    base = diffusers.UNet2DConditionModel(**case.config)
    case.base = base.state_dict()
    case.modules, case.tensors = published_for(base)
    text = {"text_embeds": torch.randn(2, 10), "time_ids": torch.rand(2, 6)}
    inputs = case.inputs | {"sample": torch.randn(2, 4, 12, 20), "added_cond_kwargs": text}
    unet = case.unet()
    report = load_linfusion_checkpoint_(unet, case.folder(tmp_path / "folder"))
    assert len(report.swapped) == len(case.modules) and not any(
        "not converted" in reason for reason in report.skipped.values()
    )
    assert relative_error(run(unet, inputs), written_out(case, inputs)) < 1e-4


def sharded(folder: Path) -> None:
    """Split the weights into shards, as save_pretrained does beyond max_shard_size."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"part-1.safetensors": names[::2], "part-2.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_load_linfusion_checkpoint_reads_shards(case: Case, folder: Path) -> None:
    sharded(folder)
    unet = case.unet()
    load_linfusion_checkpoint_(unet, folder)
    assert relative_error(run(unet, case.inputs), case.output) < 1e-4
    (folder / "part-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is missing part-2.safetensors"):
        load_linfusion_checkpoint_(case.unet(), folder)


def test_load_linfusion_checkpoint_refuses_pickles(case: Case, folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.bin, a pickle, .*safetensors.torch.save_file"):
        load_linfusion_checkpoint_(case.unet(), folder)
    (folder / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        load_linfusion_checkpoint_(case.unet(), folder)


KEY = "2.to_k_.3.bias"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tensors: tensors.pop(KEY), f"1 missing: {KEY}"),
        (lambda tensors: tensors.update({"4.to_q.weight": torch.ones(1)}), "1 not in this model: 4.to_q.weight"),
        (lambda tensors: tensors.update({KEY: torch.ones(3)}), rf"{KEY} is \[3\], the model's is \[32\]"),
        (
            lambda tensors: (tensors.pop(KEY), tensors.update({"more": torch.ones(1), "0.to_v.weight": torch.ones(2)})),
            rf"1 missing: {KEY}; 1 not in this model: more; 1 of another shape: 0.to_v.weight",
        ),
    ],
)
def test_load_linfusion_checkpoint_lists_wrong_keys_and_changes_nothing(
    case: Case, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], text: str
) -> None:
    change(case.tensors)
    unet = case.unet()
    linearize_(unet, Clear(radius=3))
    before = run(unet, case.inputs)
    with pytest.raises(ValueError, match=text):
        load_linfusion_checkpoint_(unet, case.folder(tmp_path / "folder"))
    assert torch.equal(run(unet, case.inputs), before)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"module_name": "mid_block.attn"}, "mid_block.attn is not one of its self-attention modules"),
        ({"heads": 8}, "attn1 has 32 channels in 4 heads, not 32 in 8"),
        ({"dim_n": 64}, "attn1 has 32 channels in 4 heads, not 64 in 4"),
        ({"heads": 0}, "not 32 in 0"),
        ({"heads": "4"}, r"modules_list\[0\] of .*; missing or of another type: heads"),
        ({"projection_mid_dim": -2}, "projection_channels must be an integer >= 0"),
    ],
)
def test_load_linfusion_checkpoint_refuses_wrong_modules(case: Case, tmp_path: Path, changes, text: str) -> None:
    case.modules[0] |= changes
    with pytest.raises(ValueError, match=text):
        load_linfusion_checkpoint_(case.unet(), case.folder(tmp_path / "folder"))


def test_load_linfusion_checkpoint_refuses_invalid_folders_and_models(case: Case, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is neither a local folder nor a Hub id"):
        load_linfusion_checkpoint_(case.unet(), tmp_path / "nowhere")
    for config in ({"modules_list": []}, {}, {"modules_list": {"a": 1}}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"has no config.json with a modules_list"):
            load_linfusion_checkpoint_(case.unet(), folder)
    with pytest.raises(UnsupportedModelError, match="are for a UNet2DConditionModel, got a FluxTransformer2DModel"):
        load_linfusion_checkpoint_(build("flux"), folder)


def test_load_linfusion_checkpoint_can_be_undone_if_originals_are_kept(case: Case, folder: Path) -> None:
    unet = case.unet()
    before = run(unet, case.inputs)
    load_linfusion_checkpoint_(unet, folder)
    with dense(unet):
        assert torch.equal(run(unet, case.inputs), before)
    load_linfusion_checkpoint_(unet, folder)
    restore_(unet)
    assert torch.equal(run(unet, case.inputs), before)
    load_linfusion_checkpoint_(unet, folder, keep_original=False)
    with pytest.raises(ValueError, match="originals"):
        restore_(unet)


@pytest.mark.parametrize("output", ["adapter", "adapter.safetensors"])
def test_imported_networks_survive_saving_as_an_adapter(case: Case, folder: Path, tmp_path: Path, output: str) -> None:
    student = case.unet()
    load_linfusion_checkpoint_(student, folder)
    save_adapter(student, tmp_path / output)
    unet = case.unet()
    before = run(unet, case.inputs)
    load_adapter_(unet, tmp_path / output)
    assert torch.equal(run(unet, case.inputs), run(student, case.inputs))
    file = tmp_path / output if output.endswith("s") else tmp_path / output / "lineardit.safetensors"
    saved = load_file(file)
    assert len(saved) == len(case.tensors)
    name = case.modules[2]["module_name"]
    assert torch.equal(saved[f"{name}.linear_kernel.key_term.3.bias"], case.tensors[KEY])
    restore_(unet)
    assert torch.equal(run(unet, case.inputs), before)


@pytest.mark.parametrize("method", [[], ["--method", "linfusion"]])
def test_convert_imports_without_base_weights(case: Case, folder: Path, tmp_path: Path, method) -> None:
    unet = case.unet()
    unet.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / WEIGHTS).unlink()
    arguments = ["convert", str(tmp_path / "base"), "--import", f"linfusion:{folder}", *method, "--offline"]
    assert run_command([*arguments, "-o", str(tmp_path / "adapter")]) == 0
    load_adapter_(unet, tmp_path / "adapter")
    assert relative_error(run(unet, case.inputs), case.output) < 1e-4


def test_convert_keeps_the_precision_of_the_checkpoint(case: Case, tmp_path: Path) -> None:
    case.unet().save_pretrained(tmp_path / "base")
    case.tensors = {name: tensor.half() for name, tensor in case.tensors.items()}
    folder = case.folder(tmp_path / "linfusion")
    convert_base(tmp_path / "base", None, output=tmp_path / "a.safetensors", importer=f"linfusion:{folder}")
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--import", "linfusion:nowhere"], "nowhere"),
        (["--import", "linfusion:"], "clear:FILE or linfusion:DIR"),
        (["--import", "linfusion:DIR", "--method", "clear", "--radius", "4"], "include their own settings"),
        (["--import", "linfusion:DIR", "--layers", "mid_block.*"], "converts every layer it names"),
    ],
)
def test_convert_refuses_bad_imports(case: Case, tmp_path: Path, capsys, options: list[str], expected: str) -> None:
    case.unet().save_config(tmp_path / "base")
    arguments = ["convert", str(tmp_path / "base"), *options, "--offline", "-o", str(tmp_path / "out")]
    assert run_command(arguments) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()
