"""A user's LoRA styles on a model with a trained adapter: neither changes the other, in any order of calls."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import trained_

from lineardit import Clear, dense, linearize_, load_adapter_, restore_, save_adapter
from lineardit.linearize import compile_
from lineardit.linearize.networks import denoiser
from tiny_models import build, inputs_of, run

CONFIG = Clear(radius=1.5, pool_size=2)
ATTENTION = ("attn.to_q", "attn.to_out.0", "attn1.to_q", "attn1.to_out.0")


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    """Without SD3, which covers nothing here that FLUX does not."""
    return request.param


@pytest.fixture(params=["lora", "full"])
def adapter(request: pytest.FixtureRequest, pipe: Any, tmp_path: Path) -> Path:
    """An adapter of trained weights for `pipe`, which is restored."""
    linearize_(pipe, CONFIG)
    trained_(pipe, request.param)
    save_adapter(pipe, tmp_path / "adapter")
    restore_(pipe)
    return tmp_path / "adapter"


def style_of(pipe: Any) -> dict[str, Tensor]:
    """A random LoRA on attention and on the layers around it, as `load_lora_weights` takes it."""
    part, model = denoiser(pipe)
    style = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (name.endswith(ATTENTION) or ".ff." in name or "attn2.to_k" in name):
            style[f"{part}.{name}.lora_A.weight"] = torch.randn(2, layer.in_features) * 0.3
            style[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2) * 0.3
    return style


flux_and_unet = pytest.mark.parametrize("family", ["flux", "unet"], indirect=True)


@flux_and_unet
def test_styles_can_be_switched_without_changing_the_adapter(
    pipe: Any, adapter: Path, forward: Callable[[Any], Tensor]
) -> None:
    base = forward(pipe)
    styles = {name: style_of(pipe) for name in ("one", "two")}
    load_adapter_(pipe, adapter)
    student = forward(pipe)
    assert not torch.allclose(student, base, atol=1e-3)

    pipe.load_lora_weights(styles["one"], adapter_name="one")
    one = forward(pipe)
    assert not torch.allclose(one, student, atol=1e-3)
    pipe.load_lora_weights(styles["two"], adapter_name="two")
    pipe.set_adapters(["one", "two"])
    both = forward(pipe)
    pipe.set_adapters("two")
    two = forward(pipe)
    assert len({float(out.sum()) for out in (student, one, two, both)}) == 4
    pipe.set_adapters("one")
    assert torch.equal(forward(pipe), one)
    pipe.set_adapters(["one"], adapter_weights=[0.0])
    assert torch.allclose(forward(pipe), student, atol=1e-5)
    pipe.set_adapters(["one", "two"])
    assert torch.equal(forward(pipe), both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    assert torch.equal(forward(pipe), one)
    pipe.disable_lora()
    assert torch.equal(forward(pipe), student)
    pipe.enable_lora()
    assert torch.equal(forward(pipe), one)
    pipe.unload_lora_weights()
    assert torch.equal(forward(pipe), student)
    restore_(pipe)
    assert torch.equal(forward(pipe), base)


@flux_and_unet
def test_order_of_style_and_adapter_does_not_matter(
    pipe: Any, adapter: Path, forward: Callable[[Any], Tensor], tmp_path: Path
) -> None:
    style = style_of(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    dense_style = forward(pipe)
    load_adapter_(pipe, adapter)
    styled = forward(pipe)
    with dense(pipe):
        assert torch.equal(forward(pipe), dense_style)
    save_adapter(pipe, tmp_path / "beside")
    pipe.unload_lora_weights()
    student = forward(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    assert torch.equal(forward(pipe), styled)
    load_adapter_(pipe, tmp_path / "beside")
    assert torch.equal(forward(pipe), styled)
    pipe.unload_lora_weights()
    assert torch.equal(forward(pipe), student)


@flux_and_unet
@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
def test_fused_style_works_with_the_adapter(
    pipe: Any, adapter: Path, forward: Callable[[Any], Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe.load_lora_weights(style_of(pipe), adapter_name="style")
    dense_style = forward(pipe)
    load_adapter_(pipe, adapter)
    styled = forward(pipe)
    pipe.fuse_lora()
    assert torch.allclose(forward(pipe), styled, atol=1e-4)
    with dense(pipe):
        assert torch.allclose(forward(pipe), dense_style, atol=1e-4)
    pipe.unfuse_lora()
    assert torch.allclose(forward(pipe), styled, atol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.allclose(forward(pipe), styled, atol=1e-4)
    save_adapter(pipe, tmp_path / "without_the_style")
    assert "LoRA fused into the base's weights is not saved in an adapter" in caplog.text
    restore_(pipe)
    assert torch.allclose(forward(pipe), dense_style, atol=1e-4)
    load_adapter_(pipe, adapter)
    assert torch.allclose(forward(pipe), styled, atol=1e-4)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
@pytest.mark.parametrize("adapter", ["full"], indirect=True)
def test_swapping_whole_weights_under_a_fused_style_is_refused(
    pipe: Any, adapter: Path, forward: Callable[[Any], Tensor]
) -> None:
    base = forward(pipe)
    pipe.load_lora_weights(style_of(pipe), adapter_name="style")
    pipe.fuse_lora()
    fused = forward(pipe)
    with pytest.raises(ValueError, match=r"to_[qv]\..* has a LoRA fused into it.*unfuse_lora first"):
        load_adapter_(pipe, adapter)
    assert torch.equal(forward(pipe), fused)
    pipe.unfuse_lora()
    load_adapter_(pipe, adapter)
    styled = forward(pipe)
    pipe.fuse_lora()
    for undo in (restore_, lambda pipe: dense(pipe).__enter__()):
        with pytest.raises(ValueError, match="unfuse_lora first"):
            undo(pipe)
    assert torch.allclose(forward(pipe), styled, atol=1e-4)
    pipe.unfuse_lora()
    restore_(pipe)
    pipe.unload_lora_weights()
    assert torch.allclose(forward(pipe), base, atol=1e-4)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
@pytest.mark.parametrize("adapter", ["lora"], indirect=True)
def test_saving_a_style_leaves_out_the_adapter(pipe: Any, adapter: Path, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    style = style_of(pipe)
    load_adapter_(pipe, adapter)
    pipe.load_lora_weights(style, adapter_name="style")
    model = denoiser(pipe)[1]
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(model, adapter_name="style"))
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        name: tensor.tolist() for name, tensor in style.items()
    }
    pipe.unload_lora_weights()
    assert not [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    assert [name for name, _ in model.named_parameters() if "lineardit_lora" in name]


def test_compiled_blocks_follow_styles_and_dense() -> None:
    torch._dynamo.reset()
    model, arguments = build("sd3", num_layers=1), inputs_of("sd3")
    base = run(model, arguments)
    linearize_(model, Clear(radius=1.5))
    trained_(model, "lora")
    student = run(model, arguments)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name="style")
    styled = run(model, arguments)
    compile_(model, backend="eager")
    assert torch.allclose(run(model, arguments), styled, atol=1e-6)
    model.disable_adapters()
    assert torch.allclose(run(model, arguments), student, atol=1e-6)
    with dense(model):
        assert torch.allclose(run(model, arguments), base, atol=1e-6)
    model.enable_adapters()
    assert torch.allclose(run(model, arguments), styled, atol=1e-6)
    torch._dynamo.reset()
