"""diffusers' caches, which skip blocks or attention in some steps: the remaining calls keep the window."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import hooks
from torch import Tensor

from lineardit import Clear, dense, linearize_, restore_
from tiny_models import build, inputs_of, run

TIMES = (900, 800, 500, 400)  # some caches start below a timestep, others after some calls
CACHES: dict[str, tuple[str, dict[str, Any]]] = {
    "pyramid_attention_broadcast": ("PyramidAttentionBroadcastConfig", {"spatial_attention_block_skip_range": 2}),
    "first_block_cache": ("FirstBlockCacheConfig", {"threshold": 2.0}),
    "faster_cache": ("FasterCacheConfig", {"is_guidance_distilled": True}),
    "taylorseer_cache": ("TaylorSeerCacheConfig", {"cache_interval": 2, "disable_cache_before_step": 2}),
    "mag_cache": ("MagCacheConfig", {"num_inference_steps": len(TIMES), "mag_ratios": [1.0] * len(TIMES)}),
}


class _Steps:
    """The calls for one picture, and the timestep that caches query."""

    def __init__(self, family: str) -> None:
        self.arguments = [inputs_of(family, grid=(4, 6)) for _ in TIMES]
        self.time = TIMES[0]

    def run(self, model: Any) -> list[Tensor]:
        context = model.cache_context("cond") if hasattr(model, "cache_context") else nullcontext()
        outs = []
        with context:
            for time, arguments in zip(TIMES, self.arguments, strict=True):
                self.time = time
                outs.append(run(model, arguments))
        hooks.HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks(recurse=True)
        return outs

    def cache(self, model: Any, name: str) -> None:
        config, arguments = CACHES[name]
        if not hasattr(hooks, config):
            pytest.skip(f"this diffusers has no {config}")
        if name in ("pyramid_attention_broadcast", "faster_cache"):
            arguments = arguments | {"current_timestep_callback": lambda: self.time}
        cache_config = getattr(hooks, config)(**arguments)
        if hasattr(model, "enable_cache"):
            model.enable_cache(cache_config)
        else:
            getattr(hooks, f"apply_{name}")(model, cache_config)


@pytest.mark.parametrize("cached_first", [True, False])
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, "pyramid_attention_broadcast") for family in ("unet", "sd3", "pixart", "qwen-image")),
        *((family, "first_block_cache") for family in ("flux", "qwen-image")),
        *((family, "faster_cache") for family in ("flux", "pixart")),
        ("flux", "taylorseer_cache"),
        ("flux", "mag_cache"),
    ],
)
def test_caches_skip_the_same_calls_of_a_converted_model(family: str, name: str, cached_first: bool) -> None:
    model, steps = build(family), _Steps(family)
    cached = copy.deepcopy(model)
    steps.cache(cached, name)
    base, plain = steps.run(cached), steps.run(model)
    skipped = [not torch.equal(one, other) for one, other in zip(base, plain, strict=True)]
    assert any(skipped)
    assert not skipped[0]

    linearize_(model, Clear(radius=1.5))
    windowed = run(model, steps.arguments[0])
    if cached_first:
        restore_(model)
        steps.cache(model, name)
        linearize_(model, Clear(radius=1.5))
    else:
        steps.cache(model, name)
    outs = steps.run(model)
    assert torch.equal(outs[0], windowed)
    assert not any(torch.allclose(one, other, atol=1e-4) for one, other in zip(outs, base, strict=True))
    with dense(model):
        assert torch.equal(torch.stack(steps.run(model)), torch.stack(base))
    linearize_(model, Clear(radius=20))
    assert torch.equal(torch.stack(steps.run(model)), torch.stack(base))
    restore_(model)
    assert torch.equal(torch.stack(steps.run(model)), torch.stack(base))
