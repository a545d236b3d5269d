"""A 4K picture from a prompt: python examples/text_to_image_4k.py flux-hybrid "a lighthouse in a storm" """

import sys

import torch

import lineardit

if len(sys.argv) < 3:
    sys.exit("usage: python examples/text_to_image_4k.py ADAPTER PROMPT [WIDTHxHEIGHT]")
adapter, prompt = sys.argv[1:3]
width, height = map(int, (sys.argv[3] if len(sys.argv) > 3 else "4096x4096").split("x"))
device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = lineardit.from_pretrained(adapter, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
high = lineardit.HighResolutionPipeline.from_pipe(pipe)
plan = high.plan(height, width)
print(plan)
image = high(prompt, plan=plan, generator=torch.Generator("cpu").manual_seed(0)).images[0]
image.save("4k.png")
