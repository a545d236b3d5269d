"""What a forward of FLUX.1 holds beside its weights: `python benchmarks/forward_memory.py`, seconds on a CPU.

One block of each kind of FLUX.1-dev's shape, without numbers (meta device): blocks free what they make, so that more of
them hold no more. Attention stands for any that holds its output alone. Prints the table of docs/high_resolution.md.
"""

import weakref
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lineardit.linearize.step_inputs import step_inputs
from lineardit.pipelines.estimate import CHUNK_TOKENS, GIB
from lineardit.pipelines.token_chunks import in_token_chunks

SIDES = (1024, 4096, 8192)  # pixels
PIXELS_PER_LATENT = 8


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.known = {weight.untyped_storage()._cdata for weight in known.parameters()}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.bytes.keys() | self.known:
                self.bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.bytes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.bytes.values()))
        return out


def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """In place of torch's, which on the meta device would hold all scores."""
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.no_grad()
def peak_bytes(side: int, chunk_tokens: int | None) -> tuple[int, int]:
    """Of a square picture in bfloat16; and bytes of one copy of all tokens at the model's width."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, num_layers=1, num_single_layers=1).bfloat16()
    made = step_inputs(model, "flux", (side // PIXELS_PER_LATENT,) * 2)
    arguments = {name: value.to("meta", torch.bfloat16) for name, value in made.items() if isinstance(value, Tensor)}
    arguments |= {name: made[name].to("meta") for name in ("img_ids", "txt_ids")}
    chunks = nullcontext() if chunk_tokens is None else in_token_chunks(model, chunk_tokens)
    with patch("torch.nn.functional.scaled_dot_product_attention", attention), chunks, Live(model) as live:
        model(**arguments)
    num_tokens = sum(arguments[name].shape[1] for name in ("hidden_states", "encoder_hidden_states"))
    return live.peak, num_tokens * model.inner_dim * torch.bfloat16.itemsize


def main() -> None:
    print(f"| | at once | in chunks of {CHUNK_TOKENS} |\n| --- | --- | --- |")
    for side in SIDES:
        cells = []
        for chunk_tokens in (None, CHUNK_TOKENS):
            peak, copy = peak_bytes(side, chunk_tokens)
            cells.append(f"{peak / copy:.1f} copies, {peak / GIB:.1f} GiB")
        print(f"| {side} x {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
