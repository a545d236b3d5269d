"""Autograd registration of operators whose queries share a state."""

from typing import Any

from torch import Tensor

from ..pieces.results import token_major


def register_backward(op: Any, backward_op: Any, num_inputs: int) -> None:
    """Register `backward_op` as the backward of `op`, which takes `num_inputs` tensors [B, H, N, D].

    Args:
        op: Takes these tensors and a number; returns out and the state, which has no gradient.
        backward_op: Takes the gradient of out, these tensors, the state and the number.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.number = inputs
        _, *state = output
        ctx.mark_non_differentiable(*state)
        ctx.save_for_backward(*tensors, *state)

    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *backward_op(grad_out, *ctx.saved_tensors, ctx.number), None

    @backward_op.register_fake
    def _(_grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(token_major(x, x.shape[2]) for x in arguments[:num_inputs])

    op.register_autograd(backward, setup_context=setup_context)
