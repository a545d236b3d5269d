"""Enlarge a picture four times per side: python examples/upscale.py flux-hybrid photo.jpg "what it shows" """

import sys

import torch
from PIL import Image

import lineardit
from lineardit.pipelines import Settings

if len(sys.argv) < 4:
    sys.exit("usage: python examples/upscale.py ADAPTER PICTURE PROMPT")
adapter, file, prompt = sys.argv[1:4]
device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = lineardit.from_pretrained(adapter, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
high = lineardit.HighResolutionPipeline.from_pipe(pipe)
picture = Image.open(file).convert("RGB")
large = high(
    prompt,
    image=picture,
    height=4 * picture.height,
    width=4 * picture.width,
    settings=Settings(strength=0.4),  # lower stays closer to the picture
    generator=torch.Generator("cpu").manual_seed(0),
)
large.images[0].save("upscaled.png")
