"""A measured tolerance: an implementation may err at most twice as much as the reference does in the same precision.

    max|implementation - exact| <= 2 * max|reference - exact| + ROUNDINGS roundings of the largest value

`exact` is the reference in float64 on the same (rounded) inputs. Outputs and every gradient are compared.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Function = Callable[..., Tensor]

ROUNDINGS = 4  # up to three parts (text, window, pooled) are rounded before they are added up, then their sum


def assert_close(
    actual: Tensor, exact: Tensor, low_precision: Tensor, name: str = "output", *, roundings: int = ROUNDINGS
) -> None:
    """`actual` and `low_precision` were computed in one dtype, `exact` in float64."""
    assert actual.dtype == low_precision.dtype, f"{name} has dtype {actual.dtype}, the reference {low_precision.dtype}"
    assert actual.shape == exact.shape, f"{name} has shape {tuple(actual.shape)}, the reference {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    rounding = roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    allowed = 2 * (low_precision.double() - exact).abs().max().item() + rounding
    assert error <= allowed, f"{name} is {error:.3g} off, allowed {allowed:.3g} in {actual.dtype}"


def assert_matches_reference(
    function: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    roundings: int = ROUNDINGS,
) -> None:
    """Outputs and the gradient of every input, of two functions of the same tensors that give one tensor."""
    inputs = [tensor.to(dtype) for tensor in inputs]
    grad_out = torch.randn_like(reference(*inputs))
    doubles = [tensor.double() for tensor in inputs]
    results = (
        outputs_and_gradients(function, inputs, grad_out),
        outputs_and_gradients(reference, doubles, grad_out.double()),
        outputs_and_gradients(reference, inputs, grad_out),
    )
    for index, (actual, exact, low_precision) in enumerate(zip(*results, strict=True)):
        name = "output" if index == 0 else f"gradient of input {index - 1}"
        assert_close(actual, exact, low_precision, name, roundings=roundings)


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor], grad_out: Tensor) -> list[Tensor]:
    """[output, gradient of inputs[0], gradient of inputs[1], ...]."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]
