"""Which outputs of converted attention modules a change of one image token changes."""

import inspect

import torch
from torch import Tensor, nn

from lineardit.linearize import swapped
from tiny_models import run


def attention_calls(model: nn.Module, arguments: dict) -> dict[str, tuple]:
    """Every converted module with the arguments that a real forward gives it."""
    calls: dict[str, tuple] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: calls.__setitem__(name, (module, args, dict(kwargs))),
            with_kwargs=True,
        )
        for name, module in swapped(model).items()
    ]
    run(model, arguments)
    for handle in handles:
        handle.remove()
    return calls


def changed_by_each_image_token(module: nn.Module, args: tuple, kwargs: dict, num_image: int) -> tuple[Tensor, Tensor]:
    """Which outputs a change of each image token changes: [image, changed token], [text, changed token]."""
    names = list(inspect.signature(module._dense_class.forward).parameters)[1:]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    prefix = "norm_" if "norm_hidden_states" in arguments else ""  # HiDream's names
    hidden, text = arguments[f"{prefix}hidden_states"], arguments.get(f"{prefix}encoder_hidden_states")
    # start of the image where a module gets one sequence, as FLUX's single blocks do
    level = module._lineardit_level
    start = hidden.shape[1] - num_image if level.conversion.family.text_first else 0
    if level.order is not None and level.order.shape[1] == hidden.shape[1]:
        start = int(level.order[0, 0])  # between the text and references
    copies = hidden.repeat(num_image + 1, 1, 1)
    token = torch.arange(num_image)
    copies[token, start + token] += 3 * torch.randn(num_image, hidden.shape[2])
    for name, value in arguments.items():
        if "mask" in name and value is not None:
            arguments[name] = value.expand(num_image + 1, *[-1] * (value.ndim - 1))
    arguments[f"{prefix}hidden_states"] = copies
    if text is not None:
        arguments[f"{prefix}encoder_hidden_states"] = copies if text is hidden else text.repeat(num_image + 1, 1, 1)
    with torch.no_grad():
        out = module(**arguments)
    first, *others = [part.flatten(2) for part in (out if isinstance(out, tuple) else (out,)) if part is not None]
    image_out = first[:, start : start + num_image]
    text_out = torch.cat([first[:, :start], first[:, start + num_image :], *others], 1)
    return tuple(((part[:-1] - part[-1]).abs().amax(-1) > 1e-6).T for part in (image_out, text_out))
