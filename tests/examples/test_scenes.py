"""Scenes are captioned, drawn at any size and read back; faults put into a picture are found."""

import numpy as np
import pytest
from PIL import Image

from lineardit.examples.tiny_flux import scenes
from lineardit.examples.tiny_flux.scenes.world import held_out, is_held_out

SIZES = [64, 128, 256, (96, 64), (80, 144)]
PICTURES = 60


def noisy(image: Image.Image, seed: int) -> Image.Image:
    pixels = np.asarray(image)
    noise = np.random.default_rng(seed).normal(0, 6, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("noise", [pytest.param(False, marks=pytest.mark.slow), True], ids=["clean", "noisy"])
@pytest.mark.parametrize(
    "size", [*SIZES, pytest.param(512, marks=pytest.mark.slow), pytest.param(1024, marks=pytest.mark.slow)]
)
def test_read_gives_what_was_drawn(size, noise):
    objects = correct = coherent = identical = 0
    for seed in range(PICTURES):
        scene = scenes.sample(seed, split="held_out" if seed % 2 else "train")
        image = scenes.draw(scene, size)
        scene_read = scenes.read(noisy(image, seed) if noise else image)
        objects += len(scene.objects)
        correct += len(set(scene.objects) & set(scene_read.objects))
        coherent += scene_read.coherence
        identical += scene_read == scene
    assert correct >= 0.99 * objects
    assert coherent >= 0.98 * PICTURES
    assert identical >= 0.97 * PICTURES


def test_draw_takes_width_then_height():
    assert scenes.draw(scenes.sample(0), (96, 64)).size == (96, 64)


def _halves(left: scenes.Scene, right: scenes.Scene, size: int = 128) -> Image.Image:
    """The left half of one picture beside the right half of another."""
    image = scenes.draw(left, size)
    image.paste(scenes.draw(right, size).crop((size // 2, 0, size, size)), (size // 2, 0))
    return image


TWO = scenes.parse("a red circle at the middle left and a blue cross at the middle right on striped mint")


@pytest.mark.parametrize(
    "change",
    [{"phase": 4}, {"phase": 3}, {"direction": 2}, {"tint": "dark"}, {"light": "bottom right"}, {"pattern": "shaded"}],
    ids=lambda change: "-".join(f"{k}-{v}" for k, v in change.items()),
)
def test_coherence_fails_if_the_halves_of_a_picture_disagree(change):
    values = {
        name: getattr(TWO, name) for name in ("objects", "tone", "pattern", "light", "direction", "phase", "tint")
    }
    other = scenes.Scene(**{**values, **change})
    assert scenes.read(_halves(TWO, TWO)).coherence
    assert not scenes.read(_halves(TWO, other)).coherence


def test_coherence_fails_for_a_shadow_on_the_wrong_side():
    scene = scenes.parse("a green square at the middle center on shaded sand")
    image = scenes.draw(scene, 128)
    image.paste(
        scenes.draw(scenes.Scene(objects=scene.objects, tone="sand", pattern="shaded", light="top right"), 128).crop(
            (32, 32, 96, 96)
        ),
        (32, 32),
    )
    assert not scenes.read(image).coherence


def test_score_counts_objects_right_in_colour_shape_and_cell():
    caption = "a red circle at the middle left and a blue cross at the middle right on striped mint"
    image = scenes.draw(scenes.parse(caption), 128)
    assert scenes.score(caption, image) == (2, 2)
    assert scenes.score(caption.replace("blue", "green"), image) == (1, 2)
    assert scenes.score(caption.replace("circle", "square"), image) == (1, 2)
    assert scenes.score(caption.replace("middle left", "top left"), image) == (1, 2)
    swapped = "a blue circle at the middle left and a red cross at the middle right on striped mint"
    assert scenes.score(swapped, image) == (0, 2)


def test_read_finds_nothing_in_noise():
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    scene = scenes.read(Image.fromarray(pixels))
    assert not scene.objects
    assert not scene.coherence


@pytest.mark.parametrize("reverse", [False, True])
def test_parse_inverts_say(reverse):
    for seed in range(200):
        scene = scenes.sample(seed)
        parsed = scenes.parse(scene.say(reverse=reverse))
        assert (parsed.objects, parsed.tone, parsed.pattern) == (scene.objects, scene.tone, scene.pattern)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red circle", "a caption must read like"),
        ("a rd circle at the top left on striped sand", "did you mean 'red'"),
        ("a red circle at the top lift on striped sand", "did you mean 'top left'"),
        ("a red circle at the top left on dotted sand", "pattern must be one of striped, shaded"),
        ("a red circle at the top left and a blue cross at the top left on striped sand", "different cells"),
    ],
)
def test_parse_refuses_what_it_cannot_read(caption, message):
    with pytest.raises(ValueError, match=message):
        scenes.parse(caption)


def test_sample_keeps_held_out_content_from_training():
    triples, pairs = held_out()
    assert len(triples) == 28
    assert len(pairs) == 50
    training = [scenes.sample(seed) for seed in range(2000)]
    assert not any(is_held_out(scene) for scene in training)
    for seed in range(300):
        scene = scenes.sample(seed, split="held_out")
        names = {(item.colour, item.shape, item.cell) for item in scene.objects}
        kinds = sorted(f"{item.colour} {item.shape}" for item in scene.objects)
        assert names & triples or tuple(kinds) in pairs


def test_sample_is_a_function_of_its_seed_and_uses_every_word():
    assert scenes.sample(5) == scenes.sample(5)
    words = {word for seed in range(500) for word in scenes.sample(seed).caption.split()}
    for part in (scenes.COLOURS, scenes.SHAPES, scenes.TONES, scenes.PATTERNS):
        assert words >= set(part)
