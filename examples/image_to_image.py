"""Twice as large by a model's own image-to-image pipeline, where there is no cascade (SDXL, SD3.5, ...):
python examples/image_to_image.py stabilityai/stable-diffusion-xl-base-1.0 "a lighthouse at dawn" 2048x2048
"""

import inspect
import sys

import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image
from PIL import Image

import lineardit

model, prompt, size = sys.argv[1:4]
width, height = map(int, size.split("x"))
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)

pipe = AutoPipelineForText2Image.from_pretrained(model, torch_dtype=dtype).to(device)
small = pipe(prompt, width=width // 2, height=height // 2, generator=torch.Generator("cpu").manual_seed(0)).images[0]

proxies = lineardit.ProxyTokens(num_proxies=1024)
hybrid = lineardit.Hybrid(local=lineardit.Clear(radius=16), global_=proxies, gate=1.0, focus_tokens=1024)
print(lineardit.linearize_(pipe, hybrid))
pipe.vae.enable_tiling()
enlarge = AutoPipelineForImage2Image.from_pipe(pipe)  # the same model, converted
takes = inspect.signature(enlarge.__call__).parameters
sides = {name: side for name, side in (("width", width), ("height", height)) if name in takes}  # else the picture's own
large, generator = small.resize((width, height), Image.Resampling.LANCZOS), torch.Generator("cpu").manual_seed(1)
enlarge(prompt, image=large, strength=0.3, generator=generator, **sides).images[0].save("large.png")
