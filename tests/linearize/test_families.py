"""Features of single families: reference images, prompts of different lengths, masks, positions, levels."""

import logging
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lineardit.linearize import Clear, LayoutError, UnsupportedModelError, linearize_, restore_, swapped
from lineardit.linearize.families import FAMILIES as ROWS
from lineardit.linearize.families import family_of
from lineardit.linearize.families.refused import REFUSED
from lineardit.linearize.layout import image_first, reorder
from tiny_models import MODELS, build, inputs_of, position_ids, run

GRID, REFERENCE, TEXT_LEN = (4, 5), (2, 3), 3
NUM_IMAGE, NUM_REFERENCE = 20, 6
SMALL = Clear(radius=2.3)


def _in_window() -> Tensor:
    """[image, image] bool, from the definition."""
    positions = position_ids(GRID)[:, 1:]
    return (positions[:, None] - positions[None]).square().sum(-1) < SMALL.radius**2


def _with_reference(family: str) -> dict[str, Any]:
    """Arguments for one image of `GRID`, followed by a reference of another size."""
    arguments = inputs_of(family, grid=GRID, text_len=TEXT_LEN, batch=1)
    channels = arguments["hidden_states"].shape[-1]
    arguments["hidden_states"] = torch.randn(1, NUM_IMAGE + NUM_REFERENCE, channels)
    if family == "qwen-image":
        return arguments | {"img_shapes": [[(1, *GRID), (1, *REFERENCE)]]}
    reference = position_ids(REFERENCE, axes=arguments["img_ids"].shape[1])
    reference[:, 0] = 1
    return arguments | {"img_ids": torch.cat([arguments["img_ids"], reference])}


def _one_block(family: str) -> nn.Module:
    """A model with one attention module, so that its output shows the receptive field."""
    config = {} if family == "qwen-image" else {"num_single_layers": 0}
    return build(family, num_layers=1, **config)


@pytest.mark.parametrize("family", ["flux", "flux2", "qwen-image"])
def test_reference_images_are_fully_attended_and_the_image_by_window(family: str) -> None:
    if not hasattr(diffusers, MODELS[family].needs):
        pytest.skip("not in this diffusers")
    model, arguments = _one_block(family), _with_reference(family)
    base = run(model, arguments)
    linearize_(model, Clear(radius=50), impl="tiled")
    assert torch.allclose(run(model, arguments), base, atol=1e-5)
    linearize_(model, SMALL, impl="tiled")
    out = run(model, arguments)
    changed = []
    for token in range(NUM_IMAGE + NUM_REFERENCE):
        hidden = arguments["hidden_states"].clone()
        hidden[0, token] += 1
        perturbed = run(model, {**arguments, "hidden_states": hidden})
        changed.append((perturbed - out)[0].abs().amax(-1) > 1e-6)
    by_image, by_reference = torch.stack(changed).split([NUM_IMAGE, NUM_REFERENCE])
    assert torch.equal(by_image[:, :NUM_IMAGE], _in_window())
    assert by_image[:, NUM_IMAGE:].all()  # a reference attends to the whole image
    assert by_reference.all()


@pytest.mark.parametrize("family", ["lumina2", "z-image"])
def test_batch_of_prompts_of_different_lengths_matches_single_runs(family: str) -> None:
    if not hasattr(diffusers, MODELS[family].needs):
        pytest.skip("not in this diffusers")
    model = build(family)
    linearize_(model, SMALL, impl="tiled")
    both = inputs_of(family, grid=GRID, text_len=TEXT_LEN)
    together = run(model, both).view(2, -1)
    for sample in range(2):
        single = {name: value[sample : sample + 1] for name, value in both.items()}
        if family == "lumina2":
            text_len = int(single["encoder_attention_mask"].sum())
            for name in ("encoder_hidden_states", "encoder_attention_mask"):
                single[name] = single[name][:, :text_len]
        assert torch.allclose(run(model, single).flatten(), together[sample], atol=1e-5), sample


@pytest.mark.parametrize("num_texts", [1, 2])
def test_z_image_omni_texts_precede_the_image(num_texts: int) -> None:
    if not hasattr(diffusers, "ZImageOmniPipeline"):
        pytest.skip("not in this diffusers")
    model = build("z-image", siglip_feat_dim=16)
    texts = [torch.randn(length, 16) for length in (3, 40)[:num_texts]]
    arguments = {
        "x": [[torch.randn(4, 1, 8, 16)]] * 2,  # 32 tokens, which need no padding
        "t": torch.full((2,), 0.5),
        "cap_feats": [texts] * 2,
        "siglip_feats": [None] * 2,
        "image_noise_mask": [[1]] * 2,
    }
    base = run(model, arguments)
    linearize_(model, Clear(radius=50), impl="tiled")
    assert torch.allclose(run(model, arguments), base, atol=1e-5)
    with pytest.raises(LayoutError, match="omni mode"):
        run(model, {**arguments, "x": [[torch.randn(4, 1, 8, 16)] * 2] * 2, "image_noise_mask": [[0, 1]] * 2})


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("family", ["chroma", "qwen-image", "ideogram4", "bria-fibo2", "qwen-image-21"])
def test_text_masks_are_never_expanded_to_tokens_by_tokens(family: str) -> None:
    if not hasattr(diffusers, MODELS[family].needs):
        pytest.skip("not in this diffusers")
    grid, text_len = (128, 128), 40
    model, arguments = build(family, num_layers=1), inputs_of(family, grid=grid, text_len=text_len)
    linearize_(model, Clear(radius=3), impl="tiled")
    with _LargestTensor() as largest:
        run(model, arguments)
    assert largest.bytes < (text_len + 128 * 128) ** 2 / 8


def test_chroma_masked_text_is_hidden_in_a_partial_conversion() -> None:
    model, arguments = build("chroma"), inputs_of("chroma", text_len=TEXT_LEN)
    linearize_(model, SMALL, layers="transformer_blocks.*")  # the single blocks keep upstream's mask
    out = run(model, arguments)
    arguments["encoder_hidden_states"][1, -1] += 1  # padding of the second sample
    assert torch.allclose(run(model, arguments), out, atol=1e-5)
    arguments["encoder_hidden_states"][0, -1] += 1
    assert not torch.allclose(run(model, arguments), out, atol=1e-3)


def test_chroma_float_mask_hides_text_like_a_boolean_mask() -> None:
    model, arguments = build("chroma"), inputs_of("chroma", text_len=TEXT_LEN)
    numbers = {**arguments, "attention_mask": arguments["attention_mask"].float()}
    base = run(model, numbers)
    linearize_(model, SMALL)
    assert torch.equal(run(model, numbers), run(model, arguments))
    linearize_(model, Clear(radius=50))
    assert torch.equal(run(model, numbers), base)  # upstream adds the numbers to its scores
    with pytest.raises(LayoutError, match="hide text tokens only"):
        linearize_(model, SMALL)
        run(model, {**numbers, "attention_mask": 2 * numbers["attention_mask"]})


@pytest.mark.parametrize("impl", ["auto", "tiled"])
def test_reference_of_the_same_size_is_not_mistaken_for_the_image(impl: str) -> None:
    if not hasattr(diffusers, "QwenImage21Transformer2DModel"):
        pytest.skip("not in this diffusers")
    model, arguments = build("qwen-image-21"), inputs_of("qwen-image-21", grid=(4, 6), text_len=TEXT_LEN, batch=1)
    arguments["img_shapes"] = [[(1, 4, 6)] * 2]
    arguments["hidden_states"] = torch.randn(1, 48, 4)
    arguments["img_mask"] = torch.cat([torch.ones(1, 6, dtype=torch.bool), arguments["img_mask"]], 1)
    arguments["encoder_hidden_states"] = torch.randn(1, 6 + TEXT_LEN, 16)  # includes the slots of the reference
    arguments["encoder_hidden_states_mask"] = torch.ones(1, 6 + TEXT_LEN, dtype=torch.bool)
    base = run(model, arguments)
    linearize_(model, Clear(radius=50), impl=impl)
    assert torch.allclose(run(model, arguments), base, atol=1e-5)
    linearize_(model, SMALL, impl=impl)
    out = run(model, arguments)
    assert torch.equal(out[:, :-24], base[:, :-24]) and not torch.allclose(out[:, -24:], base[:, -24:], atol=1e-4)


@pytest.mark.parametrize("layers", [None, "layers.1.*"])
def test_ideogram4_padding_is_not_attended(layers: str | None) -> None:
    if not hasattr(diffusers, "Ideogram4Transformer2DModel"):
        pytest.skip("not in this diffusers")
    model, arguments = build("ideogram4"), inputs_of("ideogram4", grid=GRID, text_len=TEXT_LEN)
    arguments["segment_ids"][1, 0] = -1
    arguments["indicator"][1, 0] = 0
    base = run(model, arguments)
    linearize_(model, Clear(radius=50), impl="tiled", layers=layers)
    assert torch.allclose(run(model, arguments)[:, 1:], base[:, 1:], atol=1e-5)
    linearize_(model, SMALL, impl="tiled", layers=layers)
    out = run(model, arguments)
    arguments["position_ids"][1, 0] += 5
    assert torch.equal(run(model, arguments)[:, 1:], out[:, 1:])
    arguments["position_ids"][0, 0] += 5
    assert not torch.allclose(run(model, arguments)[:, 1:], out[:, 1:], atol=1e-4)
    arguments["indicator"][0, -1] = 0
    with pytest.raises(LayoutError, match="one image per sequence"):
        run(model, arguments)


@pytest.mark.parametrize("family", ["flux", "flux2", "flux3", "chroma", "bria", "longcat-image", "ovis-image", "krea2"])
def test_bfloat16_ids_beyond_256_are_read_and_made_exact(family: str) -> None:
    if not hasattr(diffusers, MODELS[family].needs):
        pytest.skip("not in this diffusers")
    model, arguments = build(family), inputs_of(family, grid=(300, 280), batch=1)
    name = "position_ids" if family == "krea2" else "img_ids"
    exact = arguments[name]
    layout = family_of(model).read_layout(model, {**arguments, name: exact.to(torch.bfloat16)})
    assert layout.grid == (300, 280)
    assert torch.equal(layout.replaced[name], exact)


@pytest.mark.slow
def test_bfloat16_ids_beyond_256_give_the_float32_output() -> None:
    model, arguments = build("flux"), inputs_of("flux", grid=(300, 280), batch=1)
    linearize_(model, Clear(radius=2), impl="tiled")
    out = run(model, arguments)
    assert torch.equal(run(model, {**arguments, "img_ids": arguments["img_ids"].to(torch.bfloat16)}), out)


@pytest.mark.parametrize(
    ("family", "grid", "text"),
    [
        ("sd3", (4, 33), "32 tokens per side"),
        ("auraflow", (33, 4), "uses wrong ones beyond"),
        ("lumina2", (4, 33), "axes_lens"),
        ("z-image", (33, 4), "axes_lens"),
    ],
)
def test_grids_beyond_the_position_table_are_refused(family: str, grid: tuple[int, int], text: str) -> None:
    if not hasattr(diffusers, MODELS[family].needs):
        pytest.skip("not in this diffusers")
    model = build(family)
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match=text):
        run(model, inputs_of(family, grid=grid, batch=1))


def test_hidream_refuses_non_square_grids_beyond_its_token_limit() -> None:
    if not hasattr(diffusers, MODELS["hidream"].needs):
        pytest.skip("not in this diffusers")
    model = build("hidream")
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match="room for 64 tokens"):
        run(model, inputs_of("hidream", grid=(5, 13), batch=1))


def test_dit_refuses_non_square_images() -> None:
    model, arguments = build("dit"), inputs_of("dit")
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match="square images only"):
        run(model, {**arguments, "hidden_states": torch.randn(2, 4, 8, 12)})


def test_several_sizes_in_a_batch_are_refused() -> None:
    model, arguments = build("qwen-image"), inputs_of("qwen-image", grid=(4, 6))
    linearize_(model, SMALL)
    with pytest.raises(LayoutError, match="one by one"):
        run(model, {**arguments, "img_shapes": [[(1, 4, 6)], [(1, 6, 4)]]})


def test_qwen_image_layers_are_frames_only_with_layer3d_rope() -> None:
    model = build("qwen-image")
    arguments = inputs_of("qwen-image", grid=(4, 6)) | {"img_shapes": [[(1, 2, 6), (1, 2, 6)]] * 2}
    assert family_of(model).read_layout(model, arguments).grid == (2, 6)
    model.register_to_config(use_layer3d_rope=True)
    assert family_of(model).read_layout(model, arguments).grid == (2, 2, 6)


@pytest.mark.parametrize("starts", [(0,), (2,), (3,), (0, 2, 3)])
def test_image_first_moves_the_image_tokens_to_the_front(starts: tuple[int, ...]) -> None:
    tokens = torch.arange(9.0).expand(3, 2, 9)[..., None]  # 3 of text, 6 of the image
    assert image_first((2, 3), (0,), 3, text_first=False) is None
    order = image_first((2, 3), starts, 3, text_first=True)
    if starts == (3,):
        assert order is None
        return
    assert order is not None
    reordered = reorder(tokens, order, dim=2)
    for sample in range(3):
        start = starts[sample % len(starts)]
        assert reordered[sample, 0, :6, 0].tolist() == list(range(start, start + 6))
    assert torch.equal(reorder(reordered, order.argsort(-1), dim=2), tokens)


def test_min_tokens_skips_the_small_levels_of_a_unet() -> None:
    model, arguments = build("unet"), inputs_of("unet", grid=(16, 16))
    base = run(model, arguments)
    report = linearize_(model, SMALL, min_tokens=100)
    assert {name.split(".attentions")[0] for name in report.swapped} == {"down_blocks.0", "up_blocks.1"}
    assert "64 tokens, fewer than 100" in set(report.skipped.values())
    assert set(swapped(model)) == set(report.swapped)
    assert not torch.equal(run(model, arguments), base)
    restore_(model)
    assert torch.equal(run(model, arguments), base)


def test_min_tokens_is_refused_where_the_sample_size_is_unknown() -> None:
    for model in (build("unet-controlnet"), build("unet", sample_size=None)):
        with pytest.raises(ValueError, match=r'no sample_size: choose levels by name, such as layers="down_blocks'):
            linearize_(model, SMALL, min_tokens=100)
        linearize_(model, SMALL, layers="down_blocks.0.*")


def test_min_tokens_is_refused_without_levels_or_below_zero() -> None:
    with pytest.raises(ValueError, match="has none"):
        linearize_(build("flux"), SMALL, min_tokens=100)
    with pytest.raises(ValueError, match=">= 0"):
        linearize_(build("unet"), SMALL, min_tokens=-1)


def test_linearize_warns_about_a_controlnet_with_full_attention(caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffusers.FluxControlNetPipeline(None, None, None, None, None, None, build("flux"), build("flux-controlnet"))
    with caplog.at_level(logging.WARNING, logger="lineardit"):
        linearize_(pipe, SMALL)
        assert "controlnet (a FluxControlNetModel) keeps its full attention" in caplog.text
        caplog.clear()
        linearize_(pipe.controlnet, SMALL)
        linearize_(pipe, SMALL)
        assert not caplog.text


def test_linearize_warns_about_the_unconverted_one_of_two_controlnets(caplog: pytest.LogCaptureFixture) -> None:
    controlnets = [build("flux-controlnet"), build("flux-controlnet")]
    pipe = diffusers.FluxControlNetPipeline(None, None, None, None, None, None, build("flux"), controlnets)
    linearize_(controlnets[0], SMALL)
    with caplog.at_level(logging.WARNING, logger="lineardit"):
        linearize_(pipe, SMALL)
    (record,) = caplog.records
    assert "controlnet.nets[1] (a FluxControlNetModel) keeps its full attention" in record.getMessage()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_raise_with_the_reason(name: str) -> None:
    parent = diffusers.UNet2DConditionModel if name == "DreamLiteUNetModel" else nn.Module
    model = object.__new__(type(name, (parent,), {}))
    nn.Module.__init__(model)
    with pytest.raises(UnsupportedModelError, match=rf"a {name} {REFUSED[name].split(',')[0]}"):
        linearize_(model, SMALL)


def test_every_family_has_a_tiny_model() -> None:
    tested = {tiny.needs for tiny in MODELS.values()}
    assert ROWS.keys() - tested == {"ControlNetUnionModel", "WanVACETransformer3DModel"}
