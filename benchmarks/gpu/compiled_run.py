"""A compiled forward and backward as the first call of a process: `python -m benchmarks.gpu.compiled_run DEVICE`.

The kernels to run are then chosen while a graph is traced. Prints JSON: what ran, and how exact it was.
"""

import json
import sys
from dataclasses import asdict

import torch

from lineardit.kernels.window import choose_impl, window_attention, window_attention_reference
from lineardit.kernels.window.windows import Circle

from .cases import Case
from .correctness import outputs_and_gradients
from .judging import verdict


def main() -> None:
    device = torch.device(sys.argv[1])
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    case = Case(grid=(33, 20), radius=5, text_len=77, head_dim=64, dtype=dtype, token_major=True)
    inputs, options = case.inputs(device), case.options(device)
    grad_out = torch.randn_like(inputs[0])
    compiled = torch.compile(window_attention, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
    actual = outputs_and_gradients(compiled, inputs, options, grad_out)
    low = outputs_and_gradients(window_attention_reference, inputs, options, grad_out)
    doubles = [tensor.double() for tensor in inputs]
    exact = outputs_and_gradients(window_attention_reference, doubles, options, grad_out.double())
    ran = choose_impl(inputs[0], grid=case.grid, window=Circle(radius=case.radius), text_len=case.text_len)
    sys.stdout.write(json.dumps(asdict(verdict(actual, exact, low)) | {"ran": ran}) + "\n")


if __name__ == "__main__":
    main()
