"""A cascade of FLUX.1 with a ControlNet, which is used in every stage; both networks get the stage's settings."""

from typing import Any

import pytest
import torch
from cascade_case import seeded
from PIL import Image
from torch import Tensor
from torch import equal as same

from lineardit import Clear, HighResolutionPipeline, linearize_
from lineardit.pipelines.plan import Settings
from tiny_stock import controlnets

NETWORKS = ("transformer", "controlnet")


@pytest.fixture
def pipe() -> Any:
    pipeline = controlnets.flux()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["PIL", "tensor"])
def arguments(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of a stock call at 32 x 32 pixels."""
    given = controlnets.flux_control_arguments()
    for name in ("height", "width", "num_inference_steps", "generator", "output_type", "latents"):
        given.pop(name, None)
    noise = torch.rand(1, 3, 32, 32)
    picture = Image.fromarray((noise[0] * 255).byte().permute(1, 2, 0).numpy())
    return given | {"control_image": picture if request.param == "PIL" else noise}


def latents(pipe: Any, **given: Any) -> Tensor:
    return pipe(generator=seeded(), output_type="latent", **given).images


def test_native_stage_is_the_unconverted_stock_call(pipe: Any, arguments: dict[str, Any]) -> None:
    size = {"height": 32, "width": 32, "num_inference_steps": 2}
    expected = latents(pipe, **size, **arguments)
    for part in (pipe, pipe.controlnet):
        linearize_(part, Clear(radius=1.5))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=32)
    assert high.controlnet is pipe.controlnet
    assert same(latents(high, **size, **arguments), expected)
    assert not torch.allclose(latents(pipe, **size, **arguments), expected, atol=1e-4)


def test_controlnet_is_used_with_the_settings_of_every_stage(pipe: Any, arguments: dict[str, Any]) -> None:
    for part in (pipe, pipe.controlnet):
        linearize_(part, Clear(radius=1.5))
    high = HighResolutionPipeline.from_pipe(pipe, native_size=32)
    plan = high.plan(64, 96, num_inference_steps=1, settings=Settings(steps=1, rope_factor=3.0, proportional=1.0))
    assert plan.stages[-1].logit_factor > 1
    assert "the estimates do not include the ControlNet" in plan.notes
    seen: dict[str, list[tuple[Any, ...]]] = {name: [] for name in NETWORKS}
    for name in NETWORKS:

        def record(network: Any, _: Any, given: dict[str, Any], name: str = name) -> None:
            ids, base, conversion = given["img_ids"], network.pos_embed.theta, network._lineardit_conversion
            seen[name].append(
                (high.stage_number, ids.dtype, len(ids), base, conversion.enabled, conversion.logit_factor)
            )

        getattr(pipe, name).register_forward_pre_hook(record, with_kwargs=True)
    theta = pipe.transformer.pos_embed.theta
    steered = latents(high, plan=plan, **arguments)
    assert set(seen["transformer"]) == set(seen["controlnet"])
    assert [(stage, *rest) for stage, _, _, *rest in seen["controlnet"]] == [
        (number, theta if number == 0 else 3 * theta, number > 0, stage.logit_factor)
        for number, stage in enumerate(plan.stages)
    ]
    assert {dtype for _, dtype, *_ in seen["controlnet"]} == {torch.float32}
    assert [pipe.transformer.pos_embed.theta, pipe.controlnet.pos_embed.theta] == [theta, theta]
    unsteered = latents(high, plan=plan, **arguments, controlnet_conditioning_scale=0.0)
    assert unsteered.shape == steered.shape and not torch.allclose(unsteered, steered, atol=1e-4)
