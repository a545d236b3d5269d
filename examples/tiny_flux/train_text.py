"""Teaches the T5 encoder which words belong together, before any picture: from captions alone, in a minute or two.

Linear heads predict, from every word of an object's phrase, the colour, the shape and the cell of its object. FLUX
gives text no positions, so the transformer cannot find out by itself; with an encoder that was not trained for this,
objects take each other's colours for thousands of steps.
"""

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import scenes
from .flow import token_ids

LABELS = (tuple(scenes.COLOURS), scenes.SHAPES, scenes.CELLS)


def words_and_objects(first: int, count: int) -> tuple[list[str], list[list[tuple[int, int, int] | None]]]:
    """Captions, and for each word the indices of its object's colour, shape and cell; None if it belongs to none."""
    captions, labels = [], []
    for index in range(first, first + count):
        scene, reverse = scenes.sample(index), index % 3 == 0
        captions.append(scene.say(reverse=reverse))
        row: list[tuple[int, int, int] | None] = []
        for item in scene.objects[::-1] if reverse else scene.objects:
            label = LABELS[0].index(item.colour), LABELS[1].index(item.shape), LABELS[2].index(item.cell)
            row += [None] * bool(row) + [label] * len(item.phrase.split())  # None for the "and" between two objects
        labels.append(row)
    return captions, labels


def label_tensor(labels: list[list[tuple[int, int, int] | None]], length: int) -> Tensor:
    """[captions, length, 3], -100 (which cross_entropy ignores) where a word belongs to no object."""
    out = torch.full((len(labels), length, 3), -100)
    for row, row_labels in enumerate(labels):
        for column, item in enumerate(row_labels):
            if item is not None:
                out[row, column] = torch.tensor(item)
    return out


def train_text_encoder(pipe: FluxPipeline, *, steps: int = 300, batch_size: int = 128, device: str = "cpu") -> float:
    """Trains `pipe.text_encoder_2`; returns the share of words in new captions that predict their object fully."""
    encoder = pipe.text_encoder_2.to(device).train().requires_grad_(True)
    heads = nn.ModuleList(nn.Linear(encoder.config.d_model, len(names)) for names in LABELS).to(device)
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        logits, labels = _predict(pipe, heads, step * batch_size, batch_size, (32, 64)[step % 2], device)
        losses = [cross_entropy(logit.flatten(0, 1), labels[..., i].flatten()) for i, logit in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"text encoder: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    with torch.no_grad():
        logits, labels = _predict(pipe, heads, steps * batch_size, 1024, 64, device)
    right = torch.stack([logit.argmax(-1) == labels[..., i] for i, logit in enumerate(logits)]).all(0)
    encoder.eval()
    return right[labels[..., 0] >= 0].float().mean().item()


def _predict(
    pipe: FluxPipeline, heads: nn.ModuleList, first: int, count: int, length: int, device: str
) -> tuple[list[Tensor], Tensor]:
    captions, labels = words_and_objects(first, count)
    hidden = pipe.text_encoder_2(token_ids(pipe.tokenizer_2, captions, length).to(device))[0]
    return [head(hidden) for head in heads], label_tensor(labels, length).to(device)
