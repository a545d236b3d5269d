"""Operations of a step against CLEAR's tables, a brute-force count, and PyTorch's own counter."""

from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lineardit import Clear
from lineardit.linearize.flops import SIZES, Step, count_steps
from lineardit.linearize.methods import ClearAttention
from tiny_models import FIRST, build

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
def test_pairs_reproduces_clears_tables(config: Clear, gigaflops: tuple[float | None, ...]) -> None:
    for side, expected in zip((64, 128, 256, 512), gigaflops, strict=True):
        found = 4 * ClearAttention.pairs(config, (side, side), TEXT_LEN, num_heads=24, head_dim=128) * CHANNELS / 1e9
        assert expected is None or round(found, 1) == expected


@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (6, 4)])
@pytest.mark.parametrize(
    "config", [Clear(radius=2.5), Clear(radius=100), Clear(radius=2, pool_size=4), Clear(radius=1, pool_tokens=4)]
)
def test_pairs_counts_the_mask(grid: tuple[int, int], config: Clear) -> None:
    height, width = grid
    text_len = 3
    positions = [divmod(index, width) for index in range(height * width)]
    near = sum((a - c) ** 2 + (b - d) ** 2 < config.radius**2 for a, b in positions for c, d in positions)
    side = config.pool_size
    if config.pool_tokens is not None:
        side = next(s for s in range(2, 99) if -(-height // s) * -(-width // s) <= config.pool_tokens)
    cells = 0 if side is None else len({(row // side, col // side) for row, col in positions})
    image = near + len(positions) * (text_len + cells)
    found = ClearAttention.pairs(config, grid, text_len, num_heads=2, head_dim=8)
    assert found == image + text_len * (text_len + len(positions))


@pytest.mark.parametrize("family", FIRST)
def test_count_steps_agrees_with_pytorchs_counter(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lineardit.linearize.flops.SIZES", {"small": 64})
    model = build(family).to("meta")
    (step,) = count_steps(model, vae_scale=4)
    from lineardit.linearize import flops

    patch = 64 // 4 // step.side
    with torch.device("meta"):
        inputs = flops._INPUTS[type(model).__name__](model.config, step.side * patch)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    assert step.flops({}).before == counter.get_total_flops()


def test_count_steps_leaves_out_sizes_beyond_the_position_table() -> None:
    model = build("sd3").to("meta")  # a table of 32 x 32 positions, two latents each
    assert [step.size for step in count_steps(model, vae_scale=16)] == ["1K"]


def steps_of(family: str) -> tuple[Step, ...]:
    return count_steps(build(family).to("meta"), vae_scale=64)


@pytest.mark.parametrize("family", FIRST)
def test_step_flops_with_a_window_over_everything_saves_nothing(family: str) -> None:
    for step in steps_of(family):
        modules = {call.module for call in step.calls}
        flops = step.flops(dict.fromkeys(modules, Clear(radius=10_000)))
        assert flops.after == flops.before > flops.attention_before > 0


def test_step_flops_counts_swapped_modules_only() -> None:
    step = steps_of("flux")[0]
    one, both = step.calls[0].module, {call.module for call in step.calls}
    some = step.flops({one: Clear(radius=2)})
    every = step.flops(dict.fromkeys(both, Clear(radius=2)))
    assert every.before == some.before and every.after < some.after < some.before
    assert some.before - some.after == some.attention_before - some.attention_after


def test_step_flops_before_grows_with_the_square_and_after_with_the_pixels() -> None:
    modules = {call.module for step in steps_of("pixart") for call in step.calls}
    flops = [step.flops(dict.fromkeys(modules, Clear(radius=2))) for step in steps_of("pixart")]
    assert [step.size for step in flops] == list(SIZES)
    for small, large in pairwise(flops):
        assert large.attention_before == 16 * small.attention_before
        assert large.attention_after < 4.5 * small.attention_after
