"""diffusers' own pipelines with converted models: prompts of two lengths, guidance, two steps, not square."""

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from lineardit import Clear, dense, linearize_, restore_
from lineardit.linearize import LayoutError, swapped
from lineardit.linearize.measures.nearness import nearness
from lineardit.linearize.measures.recording import recording
from lineardit.linearize.networks import denoiser
from tiny_stock import REFUSED, STOCK, Stock, paint

SMALL, COVERING = Clear(radius=2.3), Clear(radius=50)


def _pipeline_and_arguments(stock: Stock) -> tuple[Any, dict[str, Any]]:
    try:
        getattr(diffusers, stock.needs)
    except (AttributeError, RuntimeError) as error:  # missing, or needs a newer transformers
        pytest.skip(f"this diffusers has no {stock.needs}: {error}")
    return stock.make(), stock.arguments()


def _networks(pipe: Any, stock: Stock) -> Iterator[Any]:
    """The pipeline, whose denoiser is converted, and its other networks."""
    yield pipe
    for name in stock.others:
        yield getattr(pipe, name)


def _linearize(pipe: Any, stock: Stock, config: Clear, *, impl: str = "auto") -> None:
    for network in _networks(pipe, stock):
        linearize_(network, config, impl=impl)


@pytest.mark.parametrize("name", STOCK)
def test_stock_pipeline_is_equal_with_a_covering_window_and_restored(name: str) -> None:
    stock = STOCK[name]
    pipe, arguments = _pipeline_and_arguments(stock)
    base = paint(pipe, arguments)
    tolerance = 1e-5 * max(1.0, float(base.abs().max()))
    _linearize(pipe, stock, COVERING)
    assert torch.equal(paint(pipe, arguments), base)
    if not stock.biased:
        _linearize(pipe, stock, COVERING, impl="tiled")  # reads layout and masks; "auto" makes the original call
        assert torch.allclose(paint(pipe, arguments), base, atol=tolerance)
    _linearize(pipe, stock, SMALL)
    out = paint(pipe, arguments)
    assert out.isfinite().all() and not torch.allclose(out, base, atol=tolerance)
    restore_(pipe)
    assert torch.equal(paint(pipe, arguments), base)


@pytest.mark.parametrize("name", REFUSED)
def test_stock_pipeline_without_a_window_is_refused_and_runs_dense(name: str) -> None:
    pipe, arguments = _pipeline_and_arguments(REFUSED[name])
    base = paint(pipe, arguments)
    linearize_(pipe, SMALL)
    with pytest.raises(LayoutError, match="inside `with dense"):
        paint(pipe, arguments)
    with dense(pipe):
        assert torch.equal(paint(pipe, arguments), base)


def test_control_blocks_of_vace_are_swapped() -> None:
    pipe, _ = _pipeline_and_arguments(STOCK["wan-vace"])
    linearize_(pipe, SMALL)
    assert set(swapped(pipe.transformer)) == {"blocks.0.attn1", "blocks.1.attn1", "vace_blocks.0.attn1"}


@pytest.mark.parametrize("name", STOCK)
def test_nearness_of_a_stock_pipeline_is_zero_until_it_is_converted(name: str) -> None:
    stock = STOCK[name]
    pipe, arguments = _pipeline_and_arguments(stock)
    with recording(denoiser(pipe)[1]) as predictions:
        paint(pipe, arguments)
    assert len(predictions) >= 2
    assert set(nearness(pipe, predictions).errors) == {0}
    linearize_(pipe, SMALL)
    assert nearness(pipe, predictions).mean > 0
