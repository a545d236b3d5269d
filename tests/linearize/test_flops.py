"""Operations of a step against CLEAR's tables, a brute-force count, and PyTorch's own counter."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lineardit import Clear
from lineardit.linearize.families import family_of
from lineardit.linearize.matching import attention_modules
from lineardit.linearize.measures import flops
from lineardit.linearize.measures.flops import SIZES, Step, count_steps
from lineardit.linearize.measures.step_inputs import can_make_inputs, step_inputs
from lineardit.linearize.methods import ClearAttention
from tiny_models import FAMILIES, FIRST, build, inputs_of

TEXT_LEN, CHANNELS = 512, 24 * 128  # FLUX.1


@pytest.mark.parametrize(
    ("config", "gigaflops"),
    [
        (Clear(radius=8), (63.5, None, None, None)),  # arXiv:2412.16112, table 2
        (Clear(radius=16), (86.6, None, None, None)),  # printed as 80.6; its table 7 has 0.09 TFLOP
        (Clear(radius=32), (154.1, None, None, None)),
        (Clear(radius=8, pool_size=4), (76.4, 452.4, 4277.8, 56691.9)),
        (Clear(radius=16, pool_size=4), (99.5, 558.7, 4731.7, 58565.7)),
    ],
)
def test_pairs_match_the_tables_of_the_clear_paper(config: Clear, gigaflops: tuple[float | None, ...]) -> None:
    for side, expected in zip((64, 128, 256, 512), gigaflops, strict=True):
        actual = 4 * ClearAttention.pairs(config, (side, side), TEXT_LEN, num_heads=24, head_dim=128) * CHANNELS / 1e9
        assert expected is None or round(actual, 1) == expected


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (6, 4)])
@pytest.mark.parametrize(
    "config", [Clear(radius=2.5), Clear(radius=100), Clear(radius=2, pool_size=4), Clear(radius=1, pool_tokens=4)]
)
def test_pairs_match_the_mask(grid: tuple[int, int], config: Clear) -> None:
    height, width = grid
    text_len = 3
    positions = [divmod(index, width) for index in range(height * width)]
    in_window = sum((a - c) ** 2 + (b - d) ** 2 < config.radius**2 for a, b in positions for c, d in positions)
    side = config.pool_size
    if config.pool_tokens is not None:
        side = next(s for s in range(2, 99) if -(-height // s) * -(-width // s) <= config.pool_tokens)
    cells = 0 if side is None else len({(row // side, col // side) for row, col in positions})
    image = in_window + len(positions) * (text_len + cells)
    pairs = ClearAttention.pairs(config, grid, text_len, num_heads=2, head_dim=8)
    assert pairs == image + text_len * (text_len + len(positions))


# The others compute rotary positions or attention masks by products too, which PyTorch's counter includes
COUNTED = ("flux", "sd3", "pixart", "unet", "wan", "qwen-image", "prx", "kandinsky5", "cosmos")


@pytest.mark.parametrize("family", COUNTED)
def test_count_steps_matches_the_pytorch_flop_counter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIZES", {"small": 64})
    if family not in FAMILIES:
        pytest.skip("not in this diffusers")
    model = build(family)
    (step,) = count_steps(model.to("meta"), vae_scale=4)
    torch.manual_seed(0)
    model = build(family)
    text = step_inputs(model, family_of(model).name, (16, 16))["encoder_hidden_states"].shape[1]
    inputs = inputs_of(family, grid=step.grid[-2:], text_len=text, batch=1)
    if family == "wan":
        inputs["hidden_states"] = inputs["hidden_states"][:, :, :1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    assert step.flops({}).before == counter.get_total_flops()


def test_count_steps_matches_a_count_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIZES", {"small": 64})
    (step,) = count_steps(build("dit", num_layers=3).to("meta"), vae_scale=4)
    tokens, width = 64, 32  # 8 x 8 tokens of 2 x 2 latents, 2 heads of 16
    block = tokens * (4 * width * width + 2 * 4 * width * width)  # projections, feed-forward
    timestep = 256 * width + width * width  # embedding of the timestep, in every block
    modulation = width * 6 * width
    patches = tokens * (4 * 4 * width + width * 4 * 8)
    ends = 256 * width + width * width + width * 2 * width
    products = 3 * (block + timestep + modulation) + patches + ends
    attention = 3 * 2 * tokens * tokens * width
    assert step.flops({}).before == 2 * (products + attention)


@pytest.mark.parametrize("family", FAMILIES)
def test_count_steps_finds_the_attention_of_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "SIZES", {"small": 128})
    model = build(family).to("meta")
    if not can_make_inputs(model):
        assert count_steps(model, vae_scale=4) == ()
        return
    (step,) = count_steps(model, vae_scale=4)
    modules, _ = attention_modules(model, family_of(model))
    assert {call.module for call in step.calls if step.is_image_self_attention(call)} >= modules.keys()
    large, small = (step.flops(dict.fromkeys(modules, Clear(radius=radius))) for radius in (2, 1))
    assert 0 < small.after < large.after
    assert large.before == small.before > large.attention_before > 0


def test_count_steps_leaves_out_sizes_beyond_the_position_table() -> None:
    model = build("sd3").to("meta")  # a table of 32 x 32 positions, two latents each
    assert [step.size for step in count_steps(model, vae_scale=16)] == ["1K"]


def steps_of(family: str) -> tuple[Step, ...]:
    return count_steps(build(family).to("meta"), vae_scale=64)


@pytest.mark.parametrize("family", FIRST)
def test_step_flops_of_a_covering_window_equal_the_original(family: str) -> None:
    for step in steps_of(family):
        modules = {call.module for call in step.calls}
        total = step.flops(dict.fromkeys(modules, Clear(radius=10_000)))
        assert total.after == total.before > total.attention_before > 0


def test_step_flops_count_only_swapped_modules() -> None:
    step = steps_of("flux")[0]
    single, both = step.calls[0].module, {call.module for call in step.calls}
    partial = step.flops({single: Clear(radius=2)})
    full = step.flops(dict.fromkeys(both, Clear(radius=2)))
    assert full.before == partial.before and full.after < partial.after < partial.before
    assert partial.before - partial.after == partial.attention_before - partial.attention_after


def test_step_flops_grow_quadratically_before_and_linearly_after() -> None:
    modules = {call.module for step in steps_of("pixart") for call in step.calls}
    counts = [step.flops(dict.fromkeys(modules, Clear(radius=2))) for step in steps_of("pixart")]
    assert [step.size for step in counts] == list(SIZES)
    for small, large in pairwise(counts):
        assert large.attention_before == 16 * small.attention_before
        assert large.attention_after < 4.5 * small.attention_after
