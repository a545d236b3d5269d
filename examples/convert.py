"""Swap the small model's attention, see what was swapped, draw, and go back: `python examples/convert.py`."""

import torch
from diffusers import FluxPipeline

import lineardit
from lineardit.examples import tiny_flux

prompt = "a red circle at the top left and a blue cross at the middle right on striped sand"
pipe = FluxPipeline.from_pretrained(tiny_flux.path())

report = lineardit.linearize_(pipe, lineardit.Clear(radius=4))
print(report)

settings = {"height": 128, "width": 128, "num_inference_steps": 28, "max_sequence_length": 64}
student = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]
with lineardit.dense(pipe):  # the original attention inside the block
    teacher = pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images[0]
student.save("student.png")
teacher.save("teacher.png")

lineardit.restore_(pipe)
