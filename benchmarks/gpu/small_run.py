"""A small forward and backward pass on the GPU, to run under a checker: `python -m benchmarks.gpu.small_run IMPL`."""

import sys

import torch

from lineardit.kernels.window import window_attention

SHAPES = (((13, 21), 32, 77), ((24, 40), 128, 0))  # grid, head_dim, text_len


def main() -> None:
    (impl,) = sys.argv[1:]
    for grid, head_dim, text_len in SHAPES:
        size = (1, 2, text_len + grid[0] * grid[1], head_dim)
        inputs = [torch.randn(size, dtype=torch.float16, device="cuda", requires_grad=True) for _ in range(3)]
        out = window_attention(*inputs, grid=grid, radius=5, text_len=text_len, impl=impl)
        torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
