"""No silent fallback to dense attention or to a wrong window; other tools' hooks keep working."""

import logging
from collections.abc import Callable, Iterator

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.attention_processor import AttnProcessor
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from torch.nn.functional import scaled_dot_product_attention

from impls import PORTABLE
from lineardit.linearize import (
    Clear,
    KernelNotReachedError,
    LayoutError,
    Mala,
    UnsupportedModelError,
    dense,
    linearize_,
    restore_,
    swapped,
)
from lineardit.linearize.seam import intercept
from tiny_models import build, inputs_of, position_ids, run

SMALL = Clear(radius=2.3)


class _CallsTwice:
    """A processor that calls attention twice."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        once = scaled_dot_product_attention(*[hidden_states[:, None]] * 3)
        return scaled_dot_product_attention(*[once] * 3)[:, 0]


@pytest.mark.parametrize(
    ("family", "bypass", "times"),
    [
        ("flux", lambda model: model.transformer_blocks[0].attn.set_attention_backend("flex"), 0),
        ("unet", lambda model: model.set_attn_processor(AttnProcessor()), 0),
        ("unet", lambda model: model.set_attention_slice("max"), 0),
        ("pixart", lambda model: model.transformer_blocks[1].attn1.set_processor(_CallsTwice()), 2),
    ],
    ids=["flex", "bmm", "sliced", "twice"],
)
def test_forward_that_misses_the_kernel_raises(family: str, bypass: Callable, times: int) -> None:
    model, arguments = build(family), inputs_of(family)
    linearize_(model, SMALL)
    bypass(model)
    with pytest.raises(KernelNotReachedError, match=rf"attn1? is converted.*{times} times.*Likely causes"):
        run(model, arguments)
    with dense(model):
        run(model, arguments)


def test_processor_of_the_same_kind_keeps_the_window() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)
    model.set_attn_processor(diffusers.models.transformers.transformer_flux.FluxAttnProcessor())
    assert torch.equal(run(model, arguments), out)


def test_method_with_a_buffer_for_each_head_is_refused_on_some_of_the_heads() -> None:
    model = build("flux")
    linearize_(model, Mala())
    attention, one_head = model.transformer_blocks[0].attn, torch.zeros(1, 1, 4, 8)
    intercept._check_heads(attention, one_head)
    attention.linear_kernel.register_buffer("table", torch.zeros(attention.heads))
    with pytest.raises(LayoutError, match=r"weights for each of .* heads, but only 1"):
        intercept._check_heads(attention, one_head)


def test_context_parallelism_is_refused() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    model.transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(LayoutError, match="context parallelism"):
        run(model, arguments)


@pytest.mark.parametrize(
    "ids",
    [
        torch.cat([position_ids((5, 4)), position_ids((5, 3))]),
        torch.cat([position_ids((5, 4)), position_ids((5, 3)).flip(0) + torch.tensor([1, 0, 0])]),
        position_ids((5, 7)).flip(0),
        position_ids((7, 5))[:, [0, 2, 1]],
        position_ids((5, 7)) * 2,
    ],
    ids=["two images", "two images, the second backwards", "backwards", "column-major", "stretched"],
)
def test_image_ids_that_are_not_a_rectangle_are_refused(ids: Tensor) -> None:
    model, arguments = build("flux"), {**inputs_of("flux"), "img_ids": ids}
    base = run(model, arguments)
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match=r"rectangle.*dense\(model\)"):
        run(model, arguments)
    with dense(model):
        assert torch.equal(run(model, arguments), base)


def test_image_ids_of_another_size_are_refused() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match="35 image tokens, but img_ids has 24"):
        run(model, {**arguments, "img_ids": position_ids((4, 6))})


@pytest.mark.parametrize("offset", [0, 3, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_image_ids_may_be_shifted_and_of_any_dtype(offset: int, dtype: torch.dtype) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    plain = run(model, {**arguments, "img_ids": position_ids((5, 7), offset=offset)})
    assert torch.equal(run(model, {**arguments, "img_ids": position_ids((5, 7), dtype=dtype, offset=offset)}), plain)
    assert torch.equal(run(model, {**arguments, "img_ids": position_ids((5, 7), offset=offset)[None]}), plain)


def _masks() -> Iterator[tuple[str, Tensor]]:
    attend = torch.ones(2, 38, dtype=torch.bool)
    attend[1, 1:3] = False
    yield "2d", attend
    yield "4d", attend[:, None, None]
    yield "per head", attend[:, None, None].repeat(1, 2, 1, 1)
    yield "-inf", torch.zeros(2, 1, 1, 38).masked_fill(~attend[:, None, None], float("-inf"))
    yield "-10000", torch.zeros(2, 1, 1, 38).masked_fill(~attend[:, None, None], -10000.0)


MASKS = dict(_masks())


@pytest.mark.parametrize("kind", MASKS)
def test_text_masks_are_taken_over(kind: str) -> None:
    if kind == "2d" and Version(diffusers.__version__) < Version("0.37"):
        pytest.skip("before diffusers 0.37, attention itself takes no mask of [batch, tokens]")
    mask = MASKS[kind]
    model, arguments = build("flux"), inputs_of("flux")
    arguments["joint_attention_kwargs"] = {"attention_mask": mask}
    base = run(model, arguments)
    for impl in ("auto", *PORTABLE):
        linearize_(model, Clear(radius=20), impl=impl)
        out = run(model, arguments)
        assert torch.equal(out, base) if impl == "auto" else torch.allclose(out, base, atol=1e-5)
    linearize_(model, SMALL)
    hidden = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].clone()}
    out = run(model, hidden)
    hidden["encoder_hidden_states"][1, 1:3] += 1
    assert torch.allclose(run(model, hidden), out, atol=1e-6)
    hidden["encoder_hidden_states"][1, 0] += 1
    assert not torch.allclose(run(model, hidden), out, atol=1e-3)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(38, 38, dtype=torch.bool), "mask of keys"),
        (torch.ones(2, 1, 38, 38, dtype=torch.bool).tril(), "hide text tokens only"),
        (torch.arange(38).expand(2, 38)[:, None, None] < 37, "image tokens"),
        (torch.full((2, 1, 1, 38), 0.5), "bias"),
        (torch.arange(2)[None, :, None, None].expand(2, 2, 1, 38) + torch.arange(38) > 0, "the same in every head"),
    ],
    ids=["tokens x tokens", "causal", "image", "bias", "heads differ"],
)
def test_other_masks_are_refused(mask: Tensor, message: str) -> None:
    model = build("flux")
    arguments = {**inputs_of("flux"), "joint_attention_kwargs": {"attention_mask": mask}}
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match=message):
        run(model, arguments)


def test_mask_on_a_unet_is_refused_unless_it_hides_nothing() -> None:
    model, arguments = build("unet"), inputs_of("unet", grid=(4, 6))
    linearize_(model, Clear(radius=1.5))
    model.mid_block.attentions[0].transformer_blocks[0].attn1.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
    )
    mask = torch.zeros(2, 1, 6)
    run(model, arguments)
    mask[:, :, -1] = -10000.0
    with pytest.raises(LayoutError, match="image tokens"):
        run(model, arguments)


class _CountCalls(ModelHook):
    """An accelerate hook that counts its calls."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: object, **kwargs: object) -> tuple:
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("hooked_first", [True, False])
def test_accelerate_hooks_on_attention_keep_the_window(hooked_first: bool) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base, hook, attention = run(model, arguments), _CountCalls(), model.transformer_blocks[0].attn
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    if hooked_first:
        restore_(model)
        add_hook_to_module(attention, hook)
        linearize_(model, SMALL)
    else:
        add_hook_to_module(attention, hook)
    assert torch.equal(run(model, arguments), windowed)
    if hooked_first:
        remove_hook_from_module(attention)
        assert torch.equal(run(model, arguments), windowed)
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    assert hook.calls == (1 if hooked_first else 2)


@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("cache", ["pyramid", "first block"])
def test_caches_of_diffusers_keep_the_window(cache: str, hooked_first: bool) -> None:
    model, arguments = build("flux", num_layers=2), inputs_of("flux")
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    restore_(model)

    def add_cache() -> None:
        if cache == "pyramid":
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            )
            apply_pyramid_attention_broadcast(model, config)
        else:
            apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.0))

    if hooked_first:
        add_cache()
    linearize_(model, SMALL)
    if not hooked_first:
        add_cache()
    with model.cache_context("test"):
        assert torch.equal(run(model, arguments), windowed)
        run(model, arguments)


def test_forward_set_on_the_instance_is_refused() -> None:
    model = build("flux")

    def my_forward(*args: object) -> None: ...

    model.transformer_blocks[0].attn.forward = my_forward
    with pytest.raises(
        UnsupportedModelError, match=r"transformer_blocks\.0\.attn\.forward.*my_forward.*linearize_ first"
    ):
        linearize_(model, SMALL)
    assert not swapped(model)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_sequential_offload_keeps_the_window(hooked_first: bool) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, Clear(radius=2.3, pool_size=2))
    windowed = run(model, arguments)
    if hooked_first:
        restore_(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if hooked_first:
        linearize_(model, Clear(radius=2.3, pool_size=2))
    assert torch.equal(run(model, arguments), windowed)


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.42") and torch.accelerator.current_accelerator() is None,
    reason="before diffusers 0.42, group offloading needs an accelerator",
)
@pytest.mark.parametrize("hooked_first", [True, False])
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload_keeps_the_window(offload_type: str, hooked_first: bool) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, Clear(radius=2.3, pool_size=2))
    windowed = run(model, arguments)
    if hooked_first:
        restore_(model)
    model.enable_group_offload(torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1)
    if hooked_first:
        linearize_(model, Clear(radius=2.3, pool_size=2))
    assert torch.equal(run(model, arguments), windowed)


def test_layerwise_casting_keeps_kernel_weights_in_float32() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, Clear(radius=2.3, pool_size=2))
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    run(model, arguments)
    assert model.transformer_blocks[0].attn.linear_kernel.pool_weight.dtype == torch.float32


def test_model_in_a_peft_wrapper_is_converted() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    base = run(wrapped, arguments)
    linearize_(wrapped, SMALL)
    windowed = run(wrapped, arguments)
    assert not torch.allclose(windowed, base, atol=1e-4)
    with dense(wrapped):
        assert torch.equal(run(wrapped, arguments), base)
    assert torch.allclose(run(wrapped.merge_and_unload(), arguments), windowed, atol=1e-5)
    restore_(model)


def test_linearize_in_inference_mode_leaves_a_trainable_model() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    with torch.inference_mode():
        linearize_(model, Clear(radius=2.3, pool_size=2))
        run(model, arguments)
    model(**arguments).sample.sum().backward()
    assert model.transformer_blocks[0].attn.linear_kernel.pool_weight.grad.any()


@pytest.fixture
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def _shard_one_weight(model: nn.Module) -> None:
    layer = model.transformer_blocks[0].attn.to_q
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, DeviceMesh("cpu", [0])))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("shard", [fully_shard, _shard_one_weight, nn.parallel.DistributedDataParallel])
def test_sharded_models_are_refused(shard: Callable) -> None:
    model, converted = build("flux"), build("flux")
    linearize_(converted, SMALL)
    model, converted = shard(model) or model, shard(converted) or converted
    with pytest.raises(UnsupportedModelError, match="must come before"):
        linearize_(model, SMALL)
    with pytest.raises(UnsupportedModelError, match="must come before"):
        restore_(converted)


@pytest.mark.usefixtures("process_group")
def test_sharded_attention_keeps_its_output_and_refuses_restore() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)
    attention = model.transformer_blocks[0].attn
    fully_shard(attention)
    assert torch.allclose(run(model, arguments), out, atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="must come before"):
        restore_(model)


def test_restore_refuses_a_replaced_class() -> None:
    model = build("flux")
    linearize_(model, SMALL)
    attention = model.transformer_blocks[0].attn
    attention.__class__ = type("Wrapped", (type(attention),), {})
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks\.0\.attn became a Wrapped"):
        restore_(model)


def test_untested_diffusers_version_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    linearize_(build("flux"), SMALL)
    assert not caplog.records
    monkeypatch.setattr(diffusers, "__version__", "99.0")
    with caplog.at_level(logging.WARNING):
        linearize_(build("flux"), SMALL)
    assert [record.getMessage() for record in caplog.records if "99.0" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1
