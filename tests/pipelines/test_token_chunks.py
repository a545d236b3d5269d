"""Chunks of tokens: same results, also with offloading, LoRA and the like; less memory; the model restored."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from packaging.version import Version
from peft import LoraConfig
from tiny_distill import build_tiny
from tolerance import assert_close
from torch import Tensor, nn

from benchmarks.forward_memory import peak_bytes, table_bytes
from lineardit import Clear, HighResolutionPipeline, Hybrid, ProxyTokens, UnsupportedModelError, dense, linearize_
from lineardit.linearize.compiling import compile_
from lineardit.linearize.measures.live_bytes import LiveBytes
from lineardit.linearize.measures.peak_bytes import peak_with
from lineardit.linearize.methods import RECOMMENDED
from lineardit.pipelines.estimate import Shape, forward, step_in_chunks
from lineardit.pipelines.plan import Settings, Stage
from lineardit.pipelines.token_chunks import in_token_chunks
from tiny_models import build, cast, inputs_of, run

CPU = torch.device("cpu")
SIZES = (1, 7, 38, 1000)  # chunks of 5 x 7 + 3 tokens
TOKEN_WISE = ["to_q", "proj_mlp", "proj_out", "ff.net.0.proj", "ff.net.2"]


@pytest.fixture
def model() -> Any:
    transformer = build("flux")
    linearize_(transformer, Clear(radius=1.5))
    return transformer


def in_chunks(model: nn.Module, arguments: dict[str, Any], chunk_tokens: int = 7) -> Tensor:
    with in_token_chunks(model, chunk_tokens):
        return run(model, arguments)


@pytest.mark.parametrize("chunk_tokens", SIZES)
def test_in_token_chunks_is_exact(model: Any, chunk_tokens: int) -> None:
    arguments = inputs_of("flux")
    low = run(model, arguments), in_chunks(model, arguments, chunk_tokens)
    double = cast(arguments, torch.float64)
    model.double()
    exact, chunked = run(model, double), in_chunks(model, double, chunk_tokens)
    assert float((chunked - exact).abs().max()) < 1e-12
    assert_close(low[1], exact, low[0])
    with dense(model):
        assert float((in_chunks(model, double, chunk_tokens) - run(model, double)).abs().max()) < 1e-12


def test_in_token_chunks_bounds_the_tokens_of_a_layer(model: Any) -> None:
    seen: list[int] = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        single = not hasattr(block, "ff")
        layers = (block.proj_mlp, block.act_mlp, block.proj_out) if single else (block.ff, block.ff_context)
        for layer in (*layers, block.attn.norm_q, block.attn.norm_k):
            layer.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0].shape[1]))
    run(model, inputs_of("flux"))
    assert max(seen) == 38
    seen.clear()
    in_chunks(model, inputs_of("flux"), 7)
    assert max(seen) == 7


def test_in_token_chunks_restores_the_model(model: Any) -> None:
    arguments = inputs_of("flux")
    classes, names = [type(module) for module in model.modules()], list(model.state_dict())
    before = run(model, arguments)
    with pytest.raises(RuntimeError, match="stop"), in_token_chunks(model, 7):
        assert list(model.state_dict()) == names
        model.single_transformer_blocks[0].attn.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, arguments)
        model.single_transformer_blocks[0].attn._forward_hooks.clear()
        raise RuntimeError("stop")
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(run(model, arguments), before)
    assert torch.allclose(in_chunks(model, arguments), in_chunks(model, arguments, 9), atol=1e-5)
    with in_token_chunks(model, 7), pytest.raises(ValueError, match="already runs in chunks of tokens"):
        in_chunks(model, arguments)


def test_in_token_chunks_refuses_other_models_and_bad_sizes(model: Any) -> None:
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        in_chunks(model, {}, 0)
    with pytest.raises(UnsupportedModelError, match=r"in FLUX\.1's blocks, and this PixArtTransformer2DModel has none"):
        in_chunks(build("pixart"), {})


def _styled(model: Any) -> None:
    model.add_adapter(LoraConfig(r=2, target_modules=TOKEN_WISE, init_lora_weights=False), "style")


def _fused(model: Any) -> None:
    model.fuse_qkv_projections()


def _group(offload_type: str) -> Callable[[Any], None]:
    return lambda model: model.enable_group_offload(CPU, offload_type=offload_type, num_blocks_per_group=1)


def _image_prompts(model: Any) -> None:
    """With a processor that uses the queries before RoPE."""
    block = model.transformer_blocks[0]
    processor = FluxIPAdapterAttnProcessor(model.inner_dim, model.inner_dim, num_tokens=(4,))
    block.attn.set_processor(processor)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "model offload": lambda model: cpu_offload_with_hook(model, execution_device=CPU),
    "sequential offload": lambda model: cpu_offload(model, execution_device=CPU),
    "group offload by leaves": _group("leaf_level"),
    "group offload by blocks": _group("block_level"),
    "layerwise casting": lambda model: model.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    ),
    "style": _styled,
    "fused projections": _fused,
    "image prompts": _image_prompts,
}
NO_GROUPS = Version(diffusers.__version__) < Version("0.42") and torch.accelerator.current_accelerator() is None


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_in_token_chunks_works_with(wrapper: str, model: Any) -> None:
    """Whether added before or after a stage that runs in chunks."""
    if NO_GROUPS and wrapper.startswith("group"):
        pytest.skip("before diffusers 0.42, group offloading needs an accelerator")
    arguments = inputs_of("flux")
    if wrapper == "image prompts":
        arguments["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 4, model.inner_dim)]}
        WRAPPERS[wrapper](model)
        assert torch.allclose(in_chunks(model, arguments), run(model, arguments), atol=1e-5)
        return
    plain = in_chunks(model, arguments)
    WRAPPERS[wrapper](model)
    expected = run(model, arguments)
    assert torch.allclose(in_chunks(model, arguments), expected, atol=1e-5)
    assert torch.equal(run(model, arguments), expected)
    if wrapper == "style":
        assert not torch.allclose(expected, plain, atol=1e-3)
        model.delete_adapters("style")
        assert torch.allclose(in_chunks(model, arguments), plain, atol=1e-6)


def test_in_token_chunks_works_with_quantized_layers() -> None:
    layers = pytest.importorskip("bitsandbytes.nn")
    model: Any = build("flux")
    for block in model.single_transformer_blocks:
        quantized = layers.Linear8bitLt(block.proj_mlp.in_features, block.proj_mlp.out_features, has_fp16_weights=False)
        quantized.load_state_dict(block.proj_mlp.state_dict())
        block.proj_mlp = quantized.to("cpu")
    expected = run(model, inputs_of("flux"))
    assert torch.allclose(in_chunks(model, inputs_of("flux")), expected, atol=1e-5)


@pytest.mark.slow
def test_in_token_chunks_works_with_compiled_blocks(model: Any) -> None:
    arguments = inputs_of("flux")
    expected = run(model, arguments)
    compile_(model, backend="eager")
    for _ in range(2):
        assert torch.allclose(in_chunks(model, arguments), expected, atol=1e-5)
        assert torch.allclose(run(model, arguments), expected, atol=1e-5)


def test_estimated_peak_is_the_peak_of_a_forward() -> None:
    """The count from the model's shapes, against the memory of a real forward."""
    model, arguments = build("flux", num_layers=1).bfloat16(), inputs_of("flux", grid=(24, 24), batch=1)
    config = json.dumps(dict(model.config))
    for chunk_tokens in (None, 48):
        chunks = nullcontext() if chunk_tokens is None else in_token_chunks(model, chunk_tokens)
        with chunks, LiveBytes(model) as live:
            run(model, cast(arguments, torch.bfloat16))
        shape = Shape(
            model_class="FluxTransformer2DModel", config=config, dtype=torch.bfloat16, latents=(48, 48), text_len=3
        )
        step = forward(shape)
        assert step is not None
        counted = step.peak if chunk_tokens is None else step_in_chunks(shape, chunk_tokens).peak
        assert counted == pytest.approx(live.peak, rel=0.05)


@pytest.mark.parametrize("chunk_tokens", [None, 48])
def test_peak_with_a_hybrid_is_the_peak_of_a_converted_forward(chunk_tokens: int | None) -> None:
    method = Hybrid(local=Clear(radius=2), global_=ProxyTokens(num_proxies=16), focus_tokens=32, gate=1.0)
    shape = Shape(
        model_class="FluxTransformer2DModel",
        config=json.dumps(dict(build("flux").config)),
        dtype=torch.bfloat16,
        latents=(48, 48),
        text_len=3,
    )
    step = forward(shape) if chunk_tokens is None else step_in_chunks(shape, chunk_tokens)
    model = build("flux", num_layers=1).bfloat16()
    linearize_(model, method, impl="tiled")
    chunks = nullcontext() if chunk_tokens is None else in_token_chunks(model, chunk_tokens)
    with torch.no_grad(), chunks, LiveBytes(model) as live:
        run(model, cast(inputs_of("flux", grid=(24, 24), batch=1), torch.bfloat16))
    assert step is not None
    assert peak_with(step, [method], torch.bfloat16) == pytest.approx(live.peak, rel=0.05)


def test_estimated_peak_leaves_out_position_tables() -> None:
    peaks = set()
    for side in (32, 96):
        config = json.dumps(dict(build("sd3", pos_embed_max_size=side).config))
        shape = Shape(
            model_class="SD3Transformer2DModel", config=config, dtype=torch.float32, latents=(8, 8), text_len=3
        )
        step = forward(shape)
        assert step is not None
        peaks.add(step.peak)
    assert len(peaks) == 1


@pytest.mark.parametrize(
    ("side", "chunk_tokens", "methods", "copies"),
    [(4096, None, (), 17.2), (4096, 8192, (), 8.4), (8192, 8192, (), 8.2), (4096, 8192, (RECOMMENDED,), 9.2)],
)
def test_peak_bytes_matches_the_documentation(
    side: int, chunk_tokens: int | None, methods: tuple[Any, ...], copies: float
) -> None:
    peak, copy = peak_bytes(side, chunk_tokens, methods)
    assert round(peak / copy, 1) == copies


def test_table_bytes_matches_the_documentation() -> None:
    assert round(table_bytes(4096) / 2**20, 1) == 6.5


def test_plan_uses_chunks_when_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = build_tiny()
    high = HighResolutionPipeline.from_pipe(pipe, native_size=64)
    settings = Settings(steps=1)
    free = high.plan(512, 512, settings=settings)
    assert [stage.chunk_tokens for stage in free.stages] == [None] * 4
    assert high.plan(512, 512, settings=Settings(steps=1, chunk_tokens=100)).stages[1].chunk_tokens == 100
    full_gib = free.stages[-1].gib
    monkeypatch.setattr("lineardit.pipelines.estimate.free_gib", lambda _: 0.9 * full_gib)
    short = high.plan(512, 512, settings=settings)
    assert [stage.chunk_tokens for stage in short.stages] == [None, None, None, 8192]
    assert short.stages[-1].gib < full_gib and not any("are free" in note for note in short.notes)
    assert "token-wise layers in chunks of 8192" in str(short) and short.recipe() == free.recipe()
    monkeypatch.setattr("lineardit.pipelines.estimate.free_gib", lambda _: 0.001)
    assert "GiB needed, but 0.0 are free: offload" in high.plan(512, 512, settings=settings).notes[-1]


def test_stage_in_chunks_makes_the_same_picture() -> None:
    pipe = build_tiny()
    linearize_(pipe, Clear(radius=2))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=16)
    call: dict[str, Any] = {"max_sequence_length": 8, "output_type": "latent"}
    images = []
    for chunk_tokens in (None, 9):
        plan = high.plan(32, 24, num_inference_steps=1, settings=Settings(steps=2, chunk_tokens=chunk_tokens))
        images.append(high("a", plan=plan, generator=torch.Generator().manual_seed(0), **call).images)
    assert torch.allclose(*images, atol=1e-5)
    with pytest.raises(ValueError, match="chunk_tokens of a stage must be an integer >= 1, got 0"):
        Stage(height=16, width=16, steps=1, chunk_tokens=0)
