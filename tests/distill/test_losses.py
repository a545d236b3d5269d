"""The three loss terms against values worked out by hand, and the removal of hooks."""

import pytest
import torch
from torch import nn

from lineardit.distill.config import Loss
from lineardit.distill.losses import attention_loss, attention_outputs, flow_loss, prediction_loss, weighted_sum


def test_flow_loss_is_the_distance_to_noise_minus_latents() -> None:
    student = torch.tensor([[[1.0, 2.0]]])
    latents, noise = torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[5.0, 1.0]]])
    assert flow_loss(student, latents, noise).item() == pytest.approx(((1 - 2) ** 2 + (2 - 1) ** 2) / 2)


def test_prediction_loss_is_computed_in_float32() -> None:
    student, teacher = (
        torch.full((1, 4, 2), 1.0, dtype=torch.bfloat16),
        torch.full((1, 4, 2), 1.5, dtype=torch.bfloat16),
    )
    loss = prediction_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == 0.25


def test_attention_loss_is_the_mean_over_layers_of_the_mean_over_tokens() -> None:
    # joint layer: one image token off by 2 in both channels, two text tokens off by 1 in one number of four
    joint = (torch.zeros(1, 1, 2), torch.zeros(1, 2, 2))
    student = {
        "joint": (joint[0] + 2, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])),
        "image": (torch.full((1, 3, 2), 3.0),),
    }
    teacher = {"joint": joint, "image": (torch.zeros(1, 3, 2),)}
    assert attention_loss(student, teacher).item() == pytest.approx(((4 + 4 + 1) / 6 + 9) / 2)


def test_attention_loss_keeps_no_copies_for_its_backward() -> None:
    layers = {"a": torch.randn(1, 6, 4).bfloat16().requires_grad_(), "b": torch.randn(1, 6, 4).bfloat16()}
    teacher = {name: (torch.randn(1, 6, 4).bfloat16(),) for name in layers}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        loss = attention_loss({name: (tensor,) for name, tensor in layers.items()}, teacher)
    assert max((tensor.numel() for tensor in kept), default=0) <= 1
    loss.backward()
    expected = 2 * (layers["a"].detach().float() - teacher["a"][0].float()) / 24 / 2
    torch.testing.assert_close(layers["a"].grad, expected.bfloat16())


def test_weighted_sum_uses_clears_weights_by_default() -> None:
    terms = {"flow": torch.tensor(1.0), "prediction": torch.tensor(2.0), "attention": torch.tensor(6.0)}
    assert weighted_sum(terms, Loss()).item() == 1 + 0.5 * 2 + 0.5 * 6
    assert weighted_sum({"attention": torch.tensor(6.0)}, Loss(flow=0, prediction=0, attention=2)).item() == 12


def test_attention_outputs_collects_outputs_and_removes_its_hooks() -> None:
    layers = {"a": nn.Linear(2, 2), "b": nn.Identity()}
    with attention_outputs(layers) as outputs:
        expected = layers["a"](torch.ones(1, 2))
        layers["b"]((torch.zeros(1), torch.ones(1)))
    layers["a"](torch.zeros(1, 2))
    assert torch.equal(outputs["a"][0], expected)
    assert outputs["a"][0].requires_grad
    assert len(outputs["b"]) == 2
    with pytest.raises(RuntimeError, match="stop"), attention_outputs(layers):
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in layers.values())
