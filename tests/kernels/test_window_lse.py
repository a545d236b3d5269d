"""The log-sum-exp returned by window attention: its value, and gradients through it and through the output."""

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from impls import ALL, PORTABLE
from lineardit.kernels.window import Box, Circle, Window, windowed_attention, windowed_attention_and_lse
from lineardit.kernels.window import tiled as tiled_module
from lineardit.kernels.window.partial import FLASH, PLAIN

GRID, TEXT_LEN = (9, 11), 5
WINDOWS = [Circle(radius=2.5), Box(window=(3, 5), dilation=(2, 1))]


def attend(inputs: list[Tensor], window: Window, impl: str, text_first: bool = True) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    return windowed_attention_and_lse(
        *inputs,
        grid=GRID,
        window=window,
        text_len=TEXT_LEN,
        text_first=text_first,
        text_mask=mask,
        scale=0.4,
        impl=impl,
    )


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return list(torch.randn(3, 2, 2, TEXT_LEN + 99, 8).to(dtype))


@pytest.mark.parametrize("window", WINDOWS, ids=["circle", "box"])
@pytest.mark.parametrize("impl", PORTABLE)
def test_windowed_attention_and_lse_gives_the_same_output_bit_for_bit(impl: str, window: Window) -> None:
    inputs = tensors(torch.bfloat16)
    out, lse = attend(inputs, window, impl)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    same = {"grid": GRID, "window": window, "text_len": TEXT_LEN, "text_mask": mask, "scale": 0.4, "impl": impl}
    assert torch.equal(out, windowed_attention(*inputs, **same))
    assert lse.dtype == torch.float32
    assert lse.shape == (2, 2, 99)


@pytest.mark.parametrize("text_first", [True, False], ids=["text-first", "text-last"])
@pytest.mark.parametrize("window", WINDOWS, ids=["circle", "box"])
@pytest.mark.parametrize("impl", ["masked", "tiled-flash", "tiled-plain"])
def test_gradients_of_output_and_lse_match_the_reference(
    impl: str, window: Window, text_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl.startswith("tiled"):
        partial = FLASH if impl == "tiled-flash" else PLAIN
        monkeypatch.setattr(tiled_module, "fastest_partial", lambda *_: partial)
    _compare(impl.partition("-")[0], window, text_first)


@pytest.mark.skipif("triton" not in ALL, reason="triton is not installed")
@pytest.mark.parametrize("window", WINDOWS, ids=["circle", "box"])
def test_gradients_of_output_and_lse_match_the_reference_in_triton(window: Window) -> None:
    _compare("triton", window, True)


def _compare(impl: str, window: Window, text_first: bool) -> None:
    inputs = tensors(torch.float32)
    grads = torch.randn_like(inputs[0]), torch.randn(2, 2, 99)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results = attend(leaves, window, impl, text_first)
        gradients = torch.autograd.grad(results, leaves, [grad.to(dtype) for grad in grads])
        return [*(result.detach() for result in results), *gradients]

    runs = run(impl, torch.float32), run("reference", torch.float64), run("reference", torch.float32)
    for name, *values in zip(("out", "lse", "grad query", "grad key", "grad value"), *runs, strict=True):
        assert_close(*values, name)


@pytest.mark.parametrize("impl", PORTABLE)
def test_lse_alone_passes_gradcheck(impl: str) -> None:
    inputs = [x.requires_grad_() for x in tensors(torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: attend(list(x), WINDOWS[0], impl)[1], inputs, fast_mode=True)
