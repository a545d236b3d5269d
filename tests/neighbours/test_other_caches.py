"""Caches of other packages, if installed, on a converted model: with nothing skipped, nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lineardit import Clear, dense, linearize_, restore_

SMALL = Clear(radius=1.5)


@pytest.mark.parametrize("family", ["flux"], indirect=True)
def test_cache_dit_keeps_the_window(pipe: Any, paint: Callable[..., Tensor]) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    base = paint(pipe)
    linearize_(pipe, SMALL)
    windowed = paint(pipe)
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=0.0, max_warmup_steps=0
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    assert torch.equal(paint(pipe), windowed)
    with dense(pipe):
        assert torch.equal(paint(pipe), base)
    restore_(pipe)
    assert torch.equal(paint(pipe), base)
    linearize_(pipe, SMALL)
    assert torch.equal(paint(pipe), windowed)
    cache_dit.disable_cache(pipe)
    assert torch.equal(paint(pipe), windowed)


@pytest.mark.parametrize("family", ["unet"], indirect=True)
def test_deep_cache_keeps_the_window(pipe: Any, paint: Callable[..., Tensor]) -> None:
    deep_cache = pytest.importorskip("DeepCache")
    linearize_(pipe, SMALL)
    windowed = paint(pipe)
    helper = deep_cache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=1, cache_branch_id=0)
    helper.enable()
    assert torch.equal(paint(pipe), windowed)
    helper.disable()
    assert torch.equal(paint(pipe), windowed)
