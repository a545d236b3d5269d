"""Guarantees for every family: bit-equal where the window covers the grid, otherwise exactly the window."""

import copy
import io
import pickle

import diffusers
import pytest
import torch
from receptive_field import attention_calls, changed_by_each_image_token
from torch import Tensor, nn

from impls import ALL
from lineardit.linearize import Clear, LayoutError, dense, linearize_, restore_, set_impl_, swapped
from lineardit.linearize.seam.conversion import conversion_of
from tiny_models import FAMILIES, FIRST, MODELS, build, cast, inputs_of, output, position_ids, run

IMPLS = (*ALL, "auto")
# HunyuanImage passes its blocks a keyword that diffusers' own checkpointing function refuses
CHECKPOINTED = [
    name
    for name in FAMILIES
    if getattr(diffusers, MODELS[name].needs)._supports_gradient_checkpointing and name != "hunyuan-image"
]
IN_HALF = [name for name in FAMILIES if name != "kandinsky5"]  # upstream computes parts of it in float32
PAIRS = [
    pytest.param(  # each takes seconds in Triton's interpreter
        family,
        impl,
        id=f"{family}-{impl}",
        marks=[pytest.mark.slow] if impl == "triton" and family not in FIRST else [],
    )
    for family in FAMILIES
    for impl in IMPLS
]
COVERING = Clear(radius=20)
SMALL = Clear(radius=2.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_linearize_covering_window_is_bit_equal(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, COVERING)
    assert torch.equal(run(model, arguments), base)
    linearize_(model, SMALL)
    assert not torch.allclose(run(model, arguments), base, atol=1e-4)


@pytest.mark.parametrize(("family", "impl"), PAIRS)
def test_linearize_covering_window_with_forced_impl_is_close(family: str, impl: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, COVERING, impl=impl)
    out = run(model, arguments)
    assert torch.allclose(out, base, atol=1e-5)


@pytest.mark.parametrize(("family", "impl"), PAIRS)
def test_linearize_receptive_field_is_the_window(family: str, impl: str) -> None:
    grid = (3, 5) if impl == "triton" else (5, 7)  # one sample per token: the interpreter's time is quadratic
    model = build(family)
    linearize_(model, SMALL, impl=impl)
    calls = attention_calls(model, inputs_of(family, grid=grid, batch=1))
    assert calls.keys() == swapped(model).keys()
    for name, (module, args, kwargs) in calls.items():
        in_window = _in_window(module._lineardit_level.grid, SMALL.radius)
        image_changed, text_changed = changed_by_each_image_token(module, args, kwargs, in_window.shape[0])
        assert torch.equal(image_changed, in_window), name
        text_queries = module._lineardit_level.conversion.family.text_queries
        assert text_changed.all() if text_queries else not text_changed.any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_gives_the_base_bit_for_bit(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base, names, config = run(model, arguments), set(model.state_dict()), dict(model.config)
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    linearize_(model, Clear(radius=2, pool_size=2))
    assert not torch.equal(run(model, arguments), base)
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    assert set(model.state_dict()) == names
    assert dict(model.config) == config
    assert [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()] == hooks
    assert not [name for module in model.modules() for name in vars(module) if "lineardit" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_gives_the_base_inside_and_is_undone_after(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    with dense(model), dense(model):
        assert torch.equal(run(model, arguments), base)
    with pytest.raises(KeyError), dense(model):
        raise KeyError
    assert torch.equal(run(model, arguments), windowed)


@pytest.mark.parametrize("family", FAMILIES)
def test_linearize_replaces_an_earlier_conversion(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, Clear(radius=2, pool_size=2))
    linearize_(model, SMALL)
    out = run(model, arguments)
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    linearize_(model, SMALL)
    assert torch.equal(run(model, arguments), out)


@pytest.mark.parametrize("family", FAMILIES)
def test_linearize_follows_the_resolution(family: str) -> None:
    # upstream rotates queries and keys in bfloat16: a float32 rounding difference can become a bfloat16 one
    atol = 1e-3 if family == "kandinsky5" else 1e-5
    model = build(family)
    converted = copy.deepcopy(model)
    linearize_(converted, Clear(radius=2.3, pool_tokens=4), impl="tiled")
    for grid in ((5, 7), (9, 4), (1, 6), (7, 5)):
        arguments = inputs_of(family, grid=grid, text_len=grid[1])
        fresh = copy.deepcopy(model)
        linearize_(fresh, Clear(radius=2.3, pool_tokens=4), impl="reference")
        assert torch.allclose(run(converted, arguments), run(fresh, arguments), atol=atol), grid


@pytest.mark.parametrize("family", IN_HALF)
def test_linearize_in_bfloat16_is_close_to_float32(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    linearize_(model, Clear(radius=2.3, pool_size=2))
    exact = run(model, arguments)
    out = run(model.to(torch.bfloat16), cast(arguments, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_and_pickle_are_models_of_their_own(family: str) -> None:
    model, arguments = build(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, Clear(radius=2, pool_size=2))
    out = run(model, arguments)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ]
    restore_(model)
    for copied in copies:
        run(copied, inputs_of(family, grid=(4, 4)))
        assert torch.equal(run(copied, arguments), out)
        restore_(copied)
        assert torch.equal(run(copied, arguments), base)


def test_set_impl_changes_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, COVERING)
    impls: list[str] = []

    def spy(query: Tensor, *_: Tensor, impl: str, **__: object) -> Tensor:
        impls.append(impl)
        return query

    monkeypatch.setattr("lineardit.linearize.methods.windows.windowed_attention", spy)
    run(model, arguments)
    set_impl_(model, "tiled")
    run(model, arguments)
    set_impl_(model, "auto")
    run(model, arguments)
    assert impls == ["tiled", "tiled"]


def test_flux_bfloat16_ids_beyond_256_are_made_exact() -> None:
    model = build("flux")
    linearize_(model, Clear(radius=3))
    exact = inputs_of("flux", grid=(2, 300), batch=1)
    rounded = {**exact, "img_ids": exact["img_ids"].to(torch.bfloat16)}
    assert not torch.equal(rounded["img_ids"].float(), exact["img_ids"])
    assert torch.equal(run(model, rounded), run(model, exact))
    positional = [rounded[name] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")]
    with torch.no_grad():
        out = model(*positional, rounded["timestep"], rounded["img_ids"], rounded["txt_ids"], return_dict=False)[0]
    assert torch.equal(out, run(model, exact))


def test_dense_keeps_the_rounded_ids_of_the_base() -> None:
    model = build("flux")
    arguments = inputs_of("flux", grid=(2, 300), batch=1)
    arguments["img_ids"] = arguments["img_ids"].to(torch.bfloat16)
    base = run(model, arguments)
    linearize_(model, COVERING)
    with dense(model):
        assert torch.equal(run(model, arguments), base)


def test_flux_fused_projections_keep_the_window() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    separate = run(model, arguments)
    model.fuse_qkv_projections()
    assert torch.allclose(run(model, arguments), separate, atol=1e-5)
    restore_(model)
    linearize_(model, SMALL)
    assert torch.allclose(run(model, arguments), separate, atol=1e-5)


@pytest.mark.parametrize("family", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(family: str) -> None:
    model = build(family)
    linearize_(model, Clear(radius=2.3, pool_size=2))
    arguments = inputs_of(family)
    plain = _gradients(model, [arguments])
    model.enable_gradient_checkpointing()
    for one, other in zip(_gradients(model, [arguments]), plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("family", ["flux", "unet"])
def test_gradient_checkpointing_recomputes_with_the_grid_of_its_forward(family: str) -> None:
    model = build(family)
    linearize_(model, Clear(radius=2.3))
    # the same number of tokens in both orientations, so that a count cannot distinguish them
    batches = [inputs_of(family, grid=grid) for grid in ((4, 6), (6, 4), (8, 8))]
    plain = _gradients(model, batches)
    model.enable_gradient_checkpointing()
    for one, other in zip(_gradients(model, batches), plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_gradient_checkpointing_of_an_attention_output_recomputes_its_grid() -> None:
    model = build("flux")
    linearize_(model, Clear(radius=2.3))
    weight = model.transformer_blocks[0].attn.to_v.weight

    def gradient() -> Tensor:
        outputs: list[Tensor] = []
        hook = model.single_transformer_blocks[0].attn.register_forward_hook(lambda *call: outputs.append(call[-1]))
        for grid in ((4, 6), (6, 4)):
            torch.manual_seed(grid[0])
            model(**inputs_of("flux", grid=grid))
        hook.remove()
        return torch.autograd.grad(outputs[0].square().sum(), weight)[0]

    plain = gradient()
    model.enable_gradient_checkpointing()
    assert torch.allclose(gradient(), plain, atol=1e-6)


def test_gradient_checkpointing_refuses_backward_inside_dense() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    model.enable_gradient_checkpointing()
    loss = model(**arguments).sample.sum()
    with dense(model), pytest.raises(RuntimeError, match="outside `dense"):
        loss.backward()


def test_calling_model_forward_directly_is_refused() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    for grid in ((5, 7), (7, 5), (7, 8)):
        with pytest.raises(LayoutError, match=r"call the converted model itself, not model\.forward"):
            model.forward(**inputs_of("flux", grid=grid))
        run(model, arguments)
    with dense(model):
        model.forward(**arguments)


@torch.no_grad()
def test_model_with_shared_layers_is_refused_instead_of_reusing_a_grid() -> None:
    if not hasattr(diffusers, "ZImageControlNetModel"):
        pytest.skip("this diffusers has no ZImageControlNetModel")
    model, arguments = build("z-image"), inputs_of("z-image")
    config = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 1, "control_in_dim": 4}
    places = {"control_layers_places": [0], "control_refiner_layers_places": [0]}
    control = diffusers.ZImageControlNetModel(**config, **places).eval()
    control = diffusers.ZImageControlNetModel.from_transformer(control, model)
    inputs = {**arguments, "control_context": arguments["x"]}
    linearize_(model, SMALL)
    run(model, arguments)
    with pytest.raises(LayoutError, match=r"ZImageControlNetModel\.forward reaches .* must stay dense"):
        control(**inputs)
    linearize_(model, SMALL, layers="layers.*")
    control(**inputs)


def test_state_is_freed_after_an_error_in_forward() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    with pytest.raises(RuntimeError):
        run(model, {**arguments, "encoder_hidden_states": torch.zeros(2, 3, 5)})
    conversion = conversion_of(model)
    assert conversion is not None
    assert conversion._thread is None
    run(model, arguments)


def _in_window(grid: tuple[int, ...], radius: float) -> Tensor:
    """[image tokens, image tokens] bool, from the definition; frames make no difference."""
    positions = position_ids(grid[-2:])[:, 1:].repeat(1 if len(grid) == 2 else grid[0], 1)
    return (positions[:, None] - positions[None]).square().sum(-1) < radius**2


def _gradients(model: nn.Module, batches: list[dict]) -> tuple[Tensor, ...]:
    """Gradients of the attention weights, of one loss over all outputs after all forwards."""
    weights = [weight for module in swapped(model).values() for weight in module.parameters()]
    torch.manual_seed(7)
    outs = [output(model, arguments) for arguments in batches]
    loss = sum((out * torch.randn_like(out)).mean() for out in outs)
    return tuple(gradient for gradient in torch.autograd.grad(loss, weights, allow_unused=True) if gradient is not None)
