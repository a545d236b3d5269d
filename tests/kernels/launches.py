"""Compiles every launch of a few calls for sm_90, as Triton specializes it for their tensors.

Runs in its own process, where kernels are neither interpreted nor run. Lists, strides and launches are those of a call.
Prints a line of JSON for each launch: the kernel, its grid, types and constants, which arguments are specialized, and
its shared memory.
"""

import json
import os
import sys
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.kernel_resources import SHARED_MEMORY
from lineardit.kernels.focus.attention import focus_attention
from lineardit.kernels.window import Circle, window_attention

ARCH = 90


class Utils:
    """What Triton asks of the CUDA driver, for a GPU that need not be present."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[ARCH]}

    def load_binary(self, *_: Any) -> tuple[Any, Any, int, int, int]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, maximum threads


class Launcher:
    """Prints a launch instead of running it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, *arguments: Any) -> None:
        source, names = self.source, self.source.fn.arg_names
        launch = {
            "kernel": source.fn.fn.__name__,
            "grid": arguments[:3],
            "types": dict(source.signature),
            "constants": {names[path[0]]: value for path, value in source.constants.items()},
            "specialized": [names[path[0]] for path, attributes in source.attrs.items() if attributes],
            "shared": self.metadata.shared,
        }
        sys.stdout.write(json.dumps(launch) + "\n")


class Driver:
    utils, launcher_cls = Utils(), Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def window(head_dim: int, text_len: int, dtype: torch.dtype, *, num_pooled: int = 0, masked: bool = False) -> None:
    """A forward and backward on tensors [B, H, N, D] with memory in the order [B, N, H, D]."""
    lengths = [text_len + 20 * 24] * 3 + [num_pooled] * 2
    query, key, value, *pooled = (
        torch.randn(2, length, 3, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for length in lengths
    )
    options: dict[str, Any] = {"grid": (20, 24), "radius": 5, "text_len": text_len, "impl": "triton"}
    if masked:
        options["text_mask"] = torch.rand(2, text_len) < 0.6
    out = window_attention(query, key, value, pooled=tuple(pooled) if num_pooled else None, **options)
    out.backward(torch.randn_like(out))


def focus(side: int, num_cells: int) -> None:
    inputs = [torch.randn(1, 2, length, 64, dtype=torch.bfloat16) for length in (3 * [20 * 24] + 2 * [num_cells])]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    shape: dict[str, Any] = {"grid": (20, 24), "window": Circle(radius=5), "num_tokens": 120, "side": side}
    out, lse = focus_attention(*inputs, **shape, scale=0.125, impl="triton")
    torch.autograd.backward((out, lse), (torch.randn_like(out), torch.randn_like(lse)))


def main() -> None:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    os.environ["TRITON_INTERPRET"] = "1"  # after the kernels are defined: a condition of "triton" on a CPU
    driver.set_active(Driver())
    window(128, 77, torch.bfloat16, masked=True)
    window(40, 0, torch.float16, num_pooled=70)
    window(20, 5, torch.bfloat16)
    focus(4, 49)  # cells that overlap
    focus(8, 120)  # cells of 2 x 2, which do not overlap


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret
    main()
