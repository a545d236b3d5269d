"""4K on a small GPU, one part of the model on it at a time: python examples/low_memory.py flux-hybrid "prompt" """

import sys

import torch

import lineardit
from lineardit.pipelines import Settings

if len(sys.argv) < 3:
    sys.exit("usage: python examples/low_memory.py ADAPTER PROMPT [WIDTHxHEIGHT]")
adapter, prompt = sys.argv[1:3]
width, height = map(int, (sys.argv[3] if len(sys.argv) > 3 else "4096x4096").split("x"))

pipe = lineardit.from_pretrained(adapter, dtype=torch.bfloat16)
if torch.cuda.is_available():
    pipe.enable_model_cpu_offload()  # or enable_sequential_cpu_offload: least memory, slowest
high = lineardit.HighResolutionPipeline.from_pipe(pipe)
settings = Settings(chunk_tokens=4096)  # default: 8192 if the estimate exceeds the GPU's free memory
plan = high.plan(height, width, settings=settings, tile=512)  # the VAE's tiles, in pixels
print(plan)
high(prompt, plan=plan, generator=torch.Generator("cpu").manual_seed(0)).images[0].save("low_memory.png")
