"""Plans of a cascade: sizes, noise levels, notes, and refused settings."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from lineardit.pipelines import estimate
from lineardit.pipelines.plan import Limits, Plan, Settings, Stage
from lineardit.pipelines.planning import cascade, ntk_factor, proportional_factor

FLUX = Limits(native=1024, multiple=16, largest_shift=math.exp(1.15), rope_dim=56, attention="both")
CALL: dict[str, Any] = {"first_steps": 28, "enlarge": False, "text_len": 512, "tile": 1024}


def sizes(height: int, width: int, **changes: Any) -> list[tuple[int, int]]:
    plan = cascade(height, width, FLUX, Settings(), **(CALL | changes))
    return [(stage.height, stage.width) for stage in plan.stages]


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1024, 1024, [(1024, 1024)]),
        (768, 1536, [(768, 1536)]),
        (4096, 4096, [(1024, 1024), (2048, 2048), (4096, 4096)]),
        (4096, 8192, [(720, 1456), (1296, 2576), (2304, 4592), (4096, 8192)]),
        (2048, 6144, [(592, 1776), (1104, 3296), (2048, 6144)]),
        (1000, 1001, [(1008, 1008)]),
        (64, 64, [(64, 64)]),
        (16, 10**23 - 1, [*sizes(16, 10**23)[:-1], (16, 10**23)]),
    ],
)
def test_cascade_goes_from_the_native_area_to_the_requested_size(
    height: int, width: int, expected: list[tuple[int, int]]
) -> None:
    assert sizes(height, width) == expected


def test_cascade_never_shrinks_the_given_picture() -> None:
    assert sizes(6000, 8000, enlarge=(3000, 4000)) == [(6000, 8000)]
    assert sizes(2048, 2048, enlarge=(1500, 1500)) == [(2048, 2048)]
    assert sizes(8192, 8192, enlarge=(2048, 2048)) == [(4096, 4096), (8192, 8192)]


def test_native_stage_of_a_small_picture_has_the_strength_of_the_others() -> None:
    plan = cascade(2048, 2048, FLUX, Settings(strength=0.4), **(CALL | {"enlarge": (100, 100)}))
    assert [(stage.height, stage.strength) for stage in plan.stages] == [(1024, 0.4), (2048, 0.4)]


@pytest.mark.parametrize("height", [16, 700, 1024, 1500, 3000, 5000, 8192, 20000])
@pytest.mark.parametrize("width", [16, 1000, 2048, 8192])
def test_cascade_at_most_doubles_and_keeps_the_shape(height: int, width: int) -> None:
    stages = sizes(height, width)
    for (rows, columns), (next_rows, next_columns) in pairwise(stages):
        assert rows < next_rows <= 2.1 * rows or rows == 16
        assert columns < next_columns <= 2.1 * columns or columns == 16
    assert height <= stages[-1][0] < height + 16
    assert width <= stages[-1][1] < width + 16
    assert all(rows % 16 == 0 and columns % 16 == 0 for rows, columns in stages)


def test_cascade_for_size_of_a_picture_has_no_native_stage() -> None:
    assert sizes(4096, 4096, enlarge=True) == [(2048, 2048), (4096, 4096)]
    assert sizes(1024, 1024, enlarge=True) == [(1024, 1024)]
    assert sizes(4096, 4096, enlarge=(900, 1100)) == [(2048, 2048), (4096, 4096)]
    plan = cascade(1024, 1024, FLUX, Settings(strength=0.4), **(CALL | {"enlarge": True}))
    assert plan.stages[0].strength == 0.4


def test_stage_noise_is_bounded_at_every_size() -> None:
    """Stock image-to-image starts from sigma 0.999995 at 4K, whatever the strength."""
    for side in (2048, 4096, 8192):
        stage = cascade(side, side, FLUX, Settings(), **CALL).stages[-1]
        sigmas = stage.sigmas()
        assert sigmas is not None and len(sigmas) == stage.steps
        assert sigmas[0] == pytest.approx(0.3)
        assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] > 0


def test_cascade_uses_linear_attention_where_it_pays() -> None:
    assert [stage.attention for stage in cascade(4096, 4096, FLUX, Settings(), **CALL).stages] == [
        "original",
        "converted",
        "converted",
    ]
    only = replace(FLUX, attention="original")
    plan = cascade(4096, 4096, only, Settings(proportional=1.0), **CALL)
    assert {stage.attention for stage in plan.stages} == {"original"}
    assert "not converted" in plan.notes[0]
    plan = cascade(4096, 4096, replace(FLUX, attention="converted"), Settings(), **CALL)
    assert {stage.attention for stage in plan.stages} == {"converted"}


def test_larger_stages_follow_low_frequencies_and_scale_positions() -> None:
    stages = cascade(4096, 4096, FLUX, Settings(), **CALL).stages
    assert [stage.follow for stage in stages] == [0, 1, 1]
    assert [stage.sharpen for stage in stages] == [0, 1, 1]
    assert [stage.rope_factor for stage in stages] == [1, 1, pytest.approx(4 ** (56 / 54))]
    free = cascade(4096, 4096, FLUX, Settings(follow=0, rope_factor=10), **CALL)
    assert [stage.rope_factor for stage in free.stages] == [1, 10, 10]
    assert any("expect repeated objects" in note for note in free.notes)
    assert any("have been published" in note for note in cascade(16384, 64, FLUX, Settings(), **CALL).notes)


def test_proportional_factor_is_clears_formula() -> None:
    for count in (0, -1.0, math.nan):
        with pytest.raises(ValueError, match="proportional must be > 1 / 4608 tokens"):
            proportional_factor(4608, 4608, count)
    assert proportional_factor(4608, 4608) == 1
    assert proportional_factor(65536 + 512, 4608, 10) == pytest.approx(math.sqrt(math.log(660480) / math.log(4608)))
    stages = cascade(4096, 4096, FLUX, Settings(proportional=1.0), **CALL).stages
    assert stages[0].logit_factor == 1
    assert stages[2].logit_factor == pytest.approx(proportional_factor(256 * 256 + 512, 64 * 64 + 512))


def test_ntk_factor_stretches_the_slowest_rotation() -> None:
    dim, ratio = 12, 4.0
    slowest = (dim - 2) / dim
    before, after = 10000**-slowest, (10000 * ntk_factor(ratio, dim)) ** -slowest
    assert before / after == pytest.approx(ratio)
    assert ntk_factor(0.5, dim) == 1


def test_plan_as_text_lists_stages_and_settings() -> None:
    text = str(cascade(4096, 8190, FLUX, Settings(), **CALL))
    assert text.startswith("8190x4096 in 4 stages\n  1. 1456x720, 28 steps, original attention")
    assert "from noise level 0.3, shift 3.16" in text
    assert "VAE in tiles of 1024 pixels" in text
    assert "8192x4096 is made and cropped to 8190x4096" in text


def test_small_costs_of_a_stage_are_printed_as_upper_bounds() -> None:
    stage = replace(cascade(2048, 2048, FLUX, Settings(steps=1), **CALL).stages[-1], seconds=0.4, gib=0.04)
    assert ", 1 step, " in str(stage) and str(stage).endswith("less than 1 s, less than 0.1 GiB")
    assert str(replace(stage, seconds=0.6, gib=0.06)).endswith("about 1 s, about 0.1 GiB")


def test_recipe_leaves_out_what_differs_between_machines() -> None:
    plan = cascade(2048, 2048, FLUX, Settings(), **CALL)
    timed = replace(plan, stages=tuple(replace(stage, seconds=1.0, gib=2.0) for stage in plan.stages))
    assert timed.recipe() == plan.recipe()
    assert cascade(2048, 2048, FLUX, Settings(strength=0.5), **CALL).recipe() != plan.recipe()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 0}, "height of a stage must be an integer >= 1, got 0"),
        ({"steps": 2.5}, "steps of a stage must be an integer >= 1, got 2.5"),
        ({"steps": 10**24}, "steps of a stage must be <= 10000, got 1000000000000000000000000"),
        ({"strength": 0}, r"strength of a stage must be in \(0, 1\], got 0"),
        ({"strength": 1.1}, r"in \(0, 1\], got 1.1"),
        ({"shift": -1.0}, "shift of a stage must be > 0 and finite, got -1.0"),
        ({"rope_factor": math.inf}, "rope_factor of a stage must be > 0 and finite"),
        ({"follow": 2}, r"follow of a stage must be in \[0, 1\], got 2"),
        ({"sharpen": -1}, r"sharpen of a stage must be in \[0, 10\], got -1"),
        ({"attention": "dense"}, "attention of a stage must be original or converted, got 'dense'"),
        ({"logit_factor": 1.1}, "logit_factor must be 1 with original attention, got 1.1"),
    ],
)
def test_stage_refuses_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stage(**({"height": 16, "width": 16, "steps": 1} | change))


def test_plan_refuses_sizes_that_do_not_fit() -> None:
    stage = Stage(height=16, width=16, steps=1)
    with pytest.raises(ValueError, match="at least one stage"):
        Plan(height=16, width=16, stages=())
    with pytest.raises(ValueError, match="the last stage must be at least as large as the picture, 32x16, got 16x16"):
        Plan(height=16, width=32, stages=(stage,))
    with pytest.raises(ValueError, match="tile must be an integer >= 64 pixels or None, got 8"):
        Plan(height=16, width=16, stages=(stage,), tile=8)
    with pytest.raises(ValueError, match="height and width must be integers >= 1, got 0 and 16"):
        cascade(0, 16, FLUX, Settings(), **CALL)


@pytest.mark.parametrize(
    ("seconds", "products"),
    [
        (1.0, [(8, 1)] * 3),
        (0.01, [(8, 1)] * 3 + [(512, 1)] * 3),
        (0.0001, [(8, 1)] * 3 + [(512, 1)] * 3 + [(4096, 8)] * 3 + [(4096, 64)] * 3),
    ],
)
def test_half_peak_flops_is_not_measured_for_long(
    seconds: float, products: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest product suffices on a slow device; on a fast one it ends too soon to be measured."""
    seen: list[tuple[int, int]] = []

    def product(left: torch.Tensor, right: torch.Tensor, times: int) -> float:
        seen.append((left.shape[0], times))
        return seconds

    monkeypatch.setattr(estimate, "_seconds", product)
    speed = estimate.half_peak_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert seen == products
    assert speed == pytest.approx(0.5 * 2 * math.prod(products[-1]) * 2048**2 / seconds)
