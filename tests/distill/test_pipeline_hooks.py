"""Hooks into a pipeline's call: its scheduler's last output, and a VAE that runs out of memory."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from prompted import prompted, size_of

from lineardit.distill.pictures import PictureSettings, draw_in_one_call
from lineardit.distill.pipeline_hooks import keep_last_output


def _settings(name: str) -> PictureSettings:
    height, width = size_of(name)
    return PictureSettings(height=height, width=width, steps=2)


def test_keep_last_output_keeps_the_final_latents() -> None:
    pipe = prompted("sd3")
    height, width = size_of("sd3")
    call = {"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"}
    with keep_last_output(pipe) as kept:
        latents = pipe(prompt=["a", "b"], generator=torch.Generator().manual_seed(0), **call).images
    assert torch.equal(kept[0], latents)
    assert "step" not in vars(pipe.scheduler)


TOO_LARGE = {
    "out of memory": torch.OutOfMemoryError(),
    "a tensor is too large for CUDA's kernels": RuntimeError(
        "Expected canUse32BitIndexMath(input) && canUse32BitIndexMath(output) to be true, but got false."
    ),
}


@pytest.mark.parametrize("reason", TOO_LARGE)
def test_draw_in_one_call_decodes_in_tiles_when_pictures_are_too_large(
    reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = prompted("sd3")
    untiled = draw_in_one_call(pipe, ["a", "b"], [0, 1], _settings("sd3"))[1]
    decode = type(pipe.vae).decode

    def run_out_of_memory(self: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.use_tiling:
            raise TOO_LARGE[reason]
        return decode(self, latents, *args, **kwargs)

    monkeypatch.setattr(type(pipe.vae), "decode", run_out_of_memory)
    tiled = draw_in_one_call(pipe, ["a", "b"], [0, 1], _settings("sd3"))[1]
    assert f"{reason}: the VAE decodes one picture at a time, in tiles" in caplog.text
    # each picture fits in one tile
    assert [image.tobytes() for image in tiled] == [image.tobytes() for image in untiled]
    assert "decode" not in vars(pipe.vae)
    monkeypatch.setattr(type(pipe.vae), "decode", Mock(side_effect=TOO_LARGE[reason]))
    with pytest.raises(type(TOO_LARGE[reason])):
        draw_in_one_call(pipe, ["a", "b"], [0, 1], _settings("sd3"))


def test_draw_in_one_call_warns_of_pictures_blackened_by_the_safety_checker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = prompted("sd")
    check = type(pipe).run_safety_checker
    monkeypatch.setattr(
        type(pipe), "run_safety_checker", lambda self, image, *others: (check(self, image, *others)[0], [False, True])
    )
    draw_in_one_call(pipe, ["a", "b"], [0, 1], _settings("sd"))
    assert "safety checker blacked out the picture of 'b'" in caplog.text
    assert "picture of 'a'" not in caplog.text
