"""Which weights of a model are quantized, and what they store."""

import math
from typing import Any

from torch import Tensor, nn

from ...kernels.pieces.results import dtype_name


def is_quantized(parameter: Tensor) -> bool:
    """Whether it is stored in fewer bits than its layer computes in; torchao's tensors report the compute dtype."""
    return not parameter.is_floating_point() or type(parameter) is not nn.Parameter or parameter.itemsize == 1


def quantized_types(model: nn.Module) -> str | None:
    """Types of the quantized weights by their backend's names, such as "Params4bit"; None: none are quantized."""
    return ", ".join(sorted({_kind(one) for one in model.parameters() if is_quantized(one)})) or None


def _kind(parameter: Tensor) -> str:
    return dtype_name(parameter.dtype) if type(parameter) is nn.Parameter else type(parameter).__name__


def stored_tensors(parameter: Tensor) -> list[Tensor]:
    """The plain tensors that a parameter keeps in memory: itself, or the inner tensors of one of torchao's."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter.detach()]
    names, _ = parameter.__tensor_flatten__()
    return [one for name in names for one in stored_tensors(getattr(parameter, name))]


def num_weights(parameter: nn.Parameter) -> int:
    """Number of weights that it stores; bitsandbytes packs two 4-bit ones into one element."""
    packed: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)
