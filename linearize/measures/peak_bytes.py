"""Peak bytes of a forward of a converted denoiser, including what attention allocates.

The kernel of an attention module runs on the meta device while its tensors are counted. Memory allocated inside an
operator does not count, nor do the tables of windows, a few MiB for a grid.

B batch, H heads, N tokens, D head dimension.
"""

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..layout import Grid, Layout
from ..methods import METHODS
from .flops import Call, Step
from .live_bytes import LiveBytes


def peak_with(step: Step, configs: Collection[Any], dtype: torch.dtype) -> int:
    """`step.peak` if the image's calls run under the config that holds most; `dtype` is the model's."""
    calls = {replace(call, module="") for call in step.calls if step.is_image_self_attention(call)}
    peaks = [
        call.live + _kernel_peak(config, replace(call, live=0), *step.layout(call), dtype)
        for call in calls
        for config in set(configs)
    ]
    return max([step.peak, *peaks])


@lru_cache(maxsize=256)
def _kernel_peak(config: Any, call: Call, grid: Grid, text_len: int, dtype: torch.dtype) -> int:
    """Peak bytes of one attention module's kernel, without its inputs."""
    size = (call.batch, call.heads, call.keys, call.head_dim)
    with torch.device("meta"):
        kernel = METHODS[type(config)](config, num_heads=call.heads, head_dim=call.head_dim)
        inputs = [torch.empty(size, dtype=dtype) for _ in range(3)]
    kernel.prepare_for(grid)
    with torch.no_grad(), LiveBytes(kernel, inputs) as live, _OutputOnlyAttention():
        kernel(*inputs, Layout(grid, text_len, text_first=True))
    return live.peak


class _OutputOnlyAttention(TorchFunctionMode):
    """Softmax attention allocates only its output, as fused kernels do; on meta it would allocate all logits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))
