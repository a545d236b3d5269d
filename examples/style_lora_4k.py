"""A style LoRA at 4K, on top of the adapter: python examples/style_lora_4k.py flux-hybrid LORA "a prompt" """

import sys

import torch

import lineardit

if len(sys.argv) < 4:
    sys.exit("usage: python examples/style_lora_4k.py ADAPTER LORA PROMPT [WIDTHxHEIGHT]")
adapter, lora, prompt = sys.argv[1:4]
width, height = map(int, (sys.argv[4] if len(sys.argv) > 4 else "4096x4096").split("x"))
device = "cuda" if torch.cuda.is_available() else "cpu"

pipe = lineardit.from_pretrained(adapter, dtype=torch.bfloat16 if device == "cuda" else torch.float32).to(device)
pipe.load_lora_weights(lora, adapter_name="style")
pipe.set_adapters("style", 0.8)
high = lineardit.HighResolutionPipeline.from_pipe(pipe)
high(prompt, height=height, width=width, generator=torch.Generator("cpu").manual_seed(0)).images[0].save("style.png")
