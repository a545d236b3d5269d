"""Scores of the tiny pipeline's pictures: does a picture follow its prompt, and is it coherent?"""

from collections.abc import Mapping

from PIL import Image

from .examples.tiny_flux import scenes


def judge_scene(prompt: str, image: Image.Image) -> Mapping[str, tuple[int, int]]:
    """{"objects": (right in colour, shape and cell, all), "coherence": (0 or 1, 1)}; empty for any other prompt."""
    try:
        scenes.parse(prompt)
    except ValueError:
        return {}
    return {"objects": scenes.score(prompt, image), "coherence": (int(scenes.read(image).coherence), 1)}
