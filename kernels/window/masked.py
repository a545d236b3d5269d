"""Window attention of image queries through the whole mask: for images of which a window is a large part."""

import torch
from torch import Tensor

from .interface import Implementation, Inputs
from .lists import circle_lists
from .partial import Keys, Partial, attention_bias, merge


def _plan(grid: tuple[int, ...], radius: float, device: torch.device) -> Tensor:
    """[N, N] bool, True = attend: the mask of one tile that is the image."""
    frames, height, width = (1, *grid)[-3:]
    whole = (height, width)
    return circle_lists(whole, radius, query_tile=whole, key_tile=whole).masks[0].repeat(frames, frames).to(device)


def _forward(inputs: Inputs, out: Tensor, mask: Tensor, scale: float, partial: Partial) -> Tensor:
    query, window, shared = inputs.query.to(inputs.sum_dtype), _window(inputs, mask), inputs.shared_keys()
    result, lse = partial.forward(query, window, scale)
    if shared is not None:
        result, lse = merge(result, lse, *partial.forward(query, shared, scale))
    out.copy_(result)
    return lse.transpose(1, 2).contiguous()


def _backward(
    grad_out: Tensor, inputs: Inputs, out: Tensor, lse: Tensor, mask: Tensor, scale: float, partial: Partial
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad_out, query, out = (tensor.to(inputs.sum_dtype) for tensor in (grad_out, inputs.query, out))
    window, shared, lse = _window(inputs, mask), inputs.shared_keys(), lse.transpose(1, 2)
    grad_query, *image_grads = partial.backward(grad_out, query, window, out, lse, scale)
    if shared is None:
        shared_grads = [grad.new_zeros(grad.shape) for grad in (inputs.shared_key, inputs.shared_value)]
    else:
        shared_grad_query, *shared_grads = partial.backward(grad_out, query, shared, out, lse, scale)
        grad_query = grad_query + shared_grad_query
    dtype = inputs.query.dtype
    grad_query, grad_key, grad_value = (_token_major(grad.to(dtype)) for grad in (grad_query, *image_grads))
    grad_shared_key, grad_shared_value = (grad.to(dtype).contiguous() for grad in shared_grads)
    return grad_query, grad_key, grad_value, grad_shared_key, grad_shared_value


def _window(inputs: Inputs, mask: Tensor) -> Keys:
    dtype = inputs.sum_dtype
    return Keys(inputs.key.to(dtype), inputs.value.to(dtype), attention_bias(mask, dtype))


def _token_major(tensor: Tensor) -> Tensor:
    """[B, H, N, D] with memory in the order [B, N, H, D], copied where it is not."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


MASKED = Implementation(plan=_plan, forward=_forward, backward=_backward)
