"""Generalized linear attention: the formula pair by pair, and its networks before the projections of a UNet."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from tolerance import assert_matches_reference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from trained import trained_

from lineardit import (
    Clear,
    KernelNotReachedError,
    LinFusion,
    UnsupportedModelError,
    dense,
    linearize_,
    restore_,
)
from lineardit.linearize.convert import swapped
from lineardit.linearize.layout import Layout
from lineardit.linearize.methods.linfusion import LinFusionAttention, linear_attention
from tiny_models import build, inputs_of, run


def pair_by_pair(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The formula as a sum over all pairs of tokens; [B, H, N, D]."""
    phi_query, phi_key = (torch.where(x > 0, x + 1, x.exp()) for x in (query, key))
    weights = torch.einsum("bhqd,bhkd->bhqk", phi_query, phi_key) / key.shape[2]
    return torch.einsum("bhqk,bhkd->bhqd", weights, value) / (weights.sum(-1, keepdim=True) + 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_attention_matches_the_sum_over_pairs(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 2, 3, 15, 8, dtype=torch.float64)  # a grid of 3 x 5
    query[..., 0] = key[..., 1] = 0  # where phi has a kink
    assert_matches_reference(linear_attention, pair_by_pair, (query.mT.contiguous().mT, key, value), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linear_attention_is_precise_for_small_features(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(1, 2, 15, 8).to(dtype) for _ in range(3))
    expected = pair_by_pair(query.double(), (key - 8).double(), value.double())
    out = linear_attention(query, key - 8, value)
    assert out.dtype == dtype
    assert torch.allclose(out.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_linear_attention_does_not_overflow_float16() -> None:
    query, key, value = (torch.full((1, 1, 40000, 4), size, dtype=torch.float16) for size in (3.0, 3.0, 9.0))
    assert torch.allclose(linear_attention(query, key, value), value, rtol=2e-3)


def student(config: LinFusion | None = None) -> nn.Module:
    model = build("unet")
    linearize_(model, config or LinFusion())
    trained_(model, "kernels")
    return model


class WrittenOut:
    """An attention processor with the formula of the module's docstring."""

    def __init__(self, kernel: LinFusionAttention) -> None:
        self.kernel = kernel

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        x = hidden_states
        inputs = (x + self.kernel.query_term(x), x + self.kernel.key_term(x), x)
        layers = (attn.to_q, attn.to_k, attn.to_v)
        projected = (layer(x) for layer, x in zip(layers, inputs, strict=True))
        out = pair_by_pair(*(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("config", [LinFusion(), LinFusion(projection_channels=5), LinFusion(projection_channels=0)])
def test_linearize_matches_the_formula_in_a_whole_unet(config: LinFusion) -> None:
    model, arguments = student(config), inputs_of("unet")
    written_out = copy.deepcopy(model)
    kernels = {name: module.linear_kernel for name, module in swapped(written_out).items()}
    restore_(written_out)
    for name, kernel in kernels.items():
        written_out.get_submodule(name).processor = WrittenOut(kernel)
    assert torch.allclose(run(model, arguments), run(written_out, arguments), atol=1e-5)


def test_query_term_is_zero_before_training() -> None:
    model = build("unet")
    linearize_(model, LinFusion())
    x = torch.randn(2, 7, 16)
    kernel = next(iter(swapped(model).values())).linear_kernel
    assert torch.equal(x + kernel.query_term(x), x)


def test_dense_and_restore_give_the_base_bit_for_bit() -> None:
    model, arguments = build("unet"), inputs_of("unet")
    before = run(model, arguments)
    linearize_(model, LinFusion())
    trained_(model, "kernels")
    after = run(model, arguments)
    assert not torch.allclose(after, before, atol=1e-3)
    with dense(model):
        assert torch.equal(run(model, arguments), before)
    assert torch.equal(run(model, arguments), after)
    linearize_(model, Clear(radius=100))
    assert torch.equal(run(model, arguments), before)
    linearize_(model, LinFusion())
    restore_(model)
    assert torch.equal(run(model, arguments), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_user_lora_added_before_or_after_conversion_gives_the_same_output() -> None:
    arguments, style = inputs_of("unet"), LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    torch.manual_seed(1)
    first = build("unet")
    torch.manual_seed(2)
    first.add_adapter(style)
    torch.manual_seed(3)
    linearize_(first, LinFusion())
    trained_(first, "kernels")

    torch.manual_seed(1)
    second = build("unet")
    torch.manual_seed(3)
    linearize_(second, LinFusion())
    trained_(second, "kernels")
    plain = run(second, arguments)
    torch.manual_seed(2)
    second.add_adapter(style)
    assert torch.equal(run(second, arguments), run(first, arguments))
    assert not torch.allclose(run(second, arguments), plain, atol=1e-3)
    second.delete_adapters("default")
    assert torch.allclose(run(second, arguments), plain, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_do_not_share_networks(copied) -> None:
    model, arguments = student(), inputs_of("unet")
    other, before = copied(model), run(model, arguments)
    assert torch.equal(run(other, arguments), before)
    trained_(other, "kernels")
    assert not torch.allclose(run(other, arguments), before, atol=1e-3)
    assert torch.equal(run(model, arguments), before)


def test_gradients_are_the_same_with_checkpointing() -> None:
    model, arguments = student(), inputs_of("unet")
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.train().zero_grad()
        model(**arguments)[0].square().mean().backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if "linear_kernel" in name}
        )
    assert all(torch.allclose(gradients[0][name], grad, atol=1e-6) for name, grad in gradients[1].items())
    assert all(grad.abs().max() > 0 for name, grad in gradients[0].items() if name.endswith("weight"))


def test_blocks_compile_as_one_graph() -> None:
    model, sizes = student(), [inputs_of("unet"), inputs_of("unet", grid=(9, 6))]
    eager = [run(model, arguments) for arguments in sizes]
    torch._dynamo.reset()
    model.mid_block.attentions[0].transformer_blocks[0].compile(backend="eager", fullgraph=True)
    for arguments, expected in zip(sizes, eager, strict=True):
        assert torch.allclose(run(model, arguments), expected, atol=1e-6)
    torch._dynamo.reset()


def test_bfloat16_models_have_bfloat16_networks() -> None:
    model = build("unet").bfloat16()
    linearize_(model, LinFusion())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    given = inputs_of("unet")
    floats = {key: x.bfloat16() for key, x in given.items() if torch.is_tensor(x) and x.is_floating_point()}
    assert run(model, given | floats).isfinite().all()


def test_float8_storage_keeps_the_output_close() -> None:
    model, arguments = student(), inputs_of("unet")
    before = run(model, arguments)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert (run(model, arguments) - before).abs().max() < 0.3 * before.std()


def test_fused_projections_are_refused_in_either_order() -> None:
    model = student()
    with pytest.raises(UnsupportedModelError, match="inputs differ in this method"):
        model.fuse_qkv_projections()
    model = build("unet")
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match="has fused projections"):
        linearize_(model, LinFusion())


def test_joint_attention_is_refused_with_a_suggestion() -> None:
    model = build("flux")
    with pytest.raises(UnsupportedModelError, match="use another method"):
        linearize_(model, LinFusion(projection_channels=0))
    assert not swapped(model)
    model = build("sd3")
    with pytest.raises(UnsupportedModelError, match=r"choose layers='\*\.attn2'"):
        linearize_(model, LinFusion())
    assert linearize_(model, LinFusion(), layers="*.attn2").swapped
    run(model, inputs_of("sd3"))


def test_replaced_processor_raises() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model = student()
    next(iter(swapped(model).values())).processor = AttnProcessor()
    with pytest.raises(KernelNotReachedError):
        run(model, inputs_of("unet"))


@pytest.mark.parametrize("value", [-1, 2.0, True, "8"])
def test_linfusion_refuses_bad_channels(value: object) -> None:
    with pytest.raises(ValueError, match=r"projection_channels must be an integer >= 0 or None, got"):
        LinFusion(projection_channels=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("hidden", [None, 5, 0])
def test_pairs_match_the_pytorch_flop_counter(hidden: int | None) -> None:
    config, num_heads, head_dim, grid = LinFusion(projection_channels=hidden), 3, 8, (5, 7)
    kernel = LinFusionAttention(config, num_heads=num_heads, head_dim=head_dim)
    x, channels = torch.randn(1, 35, num_heads * head_dim), num_heads * head_dim
    with FlopCounterMode(display=False) as counter:
        kernel.query_term(x), kernel.key_term(x)
        heads = x.unflatten(-1, (num_heads, head_dim)).transpose(1, 2)
        kernel(heads, heads, heads, Layout(grid, 0, True))
    normalizer = 2 * 35 * channels
    pairs = LinFusionAttention.pairs(config, grid, 0, num_heads=num_heads, head_dim=head_dim)
    assert 4 * pairs * channels == counter.get_total_flops() - normalizer
