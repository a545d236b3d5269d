"""The backward of an operator of tokens whose queries share a state."""

from typing import Any

from torch import Tensor

from ..pieces.results import token_major


def register_backward(op: Any, backward_op: Any, num_inputs: int) -> None:
    """Lets `backward_op` give the gradients of `op`'s `num_inputs` tensors [B, H, N, D].

    Args:
        op: Of these tensors and a number, to out and the state, which has no gradient.
        backward_op: Of out's gradient, these tensors, the state and the number.
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
