"""The shipped pipeline: complete, small, and able to draw its captions."""

import json

import pytest
import torch
from diffusers import FluxPipeline

from lineardit.examples.tiny_flux import path, scenes
from lineardit.examples.tiny_flux.model import build_pipeline, vocabulary
from lineardit.examples.tiny_flux.train_vae import measure

CAPTIONS = 4


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_path_holds_a_small_pipeline_without_pickles():
    files = [file for file in path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 8_500_000
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert json.loads((path() / "model_index.json").read_text())["_class_name"] == "FluxPipeline"


def test_shipped_pipeline_has_the_shapes_that_the_code_builds(pipe):
    built = build_pipeline()
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        shapes = {key: tensor.shape for key, tensor in getattr(built, name).state_dict().items()}
        assert {key: tensor.shape for key, tensor in getattr(pipe, name).state_dict().items()} == shapes
    assert sum(parameter.numel() for parameter in pipe.transformer.parameters()) <= 6_000_000


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_vae_keeps_drawn_scenes(pipe, size):
    psnr, mean, std = measure(pipe.vae, size)
    assert psnr >= 35
    assert mean == pytest.approx(pipe.vae.config.shift_factor, abs=0.1)
    assert std * pipe.vae.config.scaling_factor == pytest.approx(1, abs=0.1)


def test_autoencoder_keeps_every_object(pipe):
    """Training the transformer cannot recover what the autoencoder loses."""
    right = total = 0
    for seed in range(24):
        scene = scenes.sample(seed, split="held_out")
        pixels = pipe.image_processor.preprocess(scenes.draw(scene, 128))
        decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        (image,) = pipe.image_processor.postprocess(decoded.detach())
        right, total = (sum(pair) for pair in zip((right, total), scenes.score(scene.caption, image), strict=True))
    assert right >= 0.97 * total


def test_tokenizers_know_every_word_of_a_caption(pipe):
    for seed in range(50):
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
            ids = tokenizer(scenes.sample(seed, split="held_out").caption).input_ids
            assert vocabulary()["<unk>"] not in ids
            assert ids[-1] == vocabulary()["</s>"]


def test_pipeline_draws_what_a_caption_says(pipe):
    """A smoke test with few steps; `make marks` measures objects and coherence."""
    captions = [scenes.sample(seed, split="held_out").caption for seed in range(CAPTIONS)]
    images = pipe(
        captions,
        height=128,
        width=128,
        num_inference_steps=10,
        max_sequence_length=64,
        generator=[torch.Generator().manual_seed(seed) for seed in range(CAPTIONS)],
    ).images
    right = total = 0
    for caption, image in zip(captions, images, strict=True):
        described, drawn = scenes.parse(caption), scenes.read(image)
        assert (drawn.tone, drawn.pattern) == (described.tone, described.pattern)
        right, total = (sum(pair) for pair in zip((right, total), scenes.score(caption, image), strict=True))
    assert right >= 0.75 * total
