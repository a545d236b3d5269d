"""`fuse_qkv_projections` and back, on both generations of diffusers' attention classes."""

import diffusers
import pytest
import torch
from torch import nn

from lineardit import Clear, dense, linearize_, restore_
from lineardit.linearize.weights.training import add_lora_
from tiny_models import build, inputs_of, run

SMALL = Clear(radius=2.3)


def _model(family: str) -> nn.Module:
    if family != "sd3":
        return build(family)
    # diffusers' own fused processor fails with dual attention, and leaves out the norm of queries and keys
    config = {**build("sd3").config, "dual_attention_layers": (), "qk_norm": None}
    return diffusers.SD3Transformer2DModel.from_config(config).eval()


@pytest.mark.parametrize("fused_first", [True, False])
@pytest.mark.parametrize("family", ["flux", "sd3", "unet", "pixart"])
def test_fused_projections_keep_the_window(family: str, fused_first: bool) -> None:
    model, arguments = _model(family), inputs_of(family)
    base = run(model, arguments)
    linearize_(model, SMALL)
    windowed = run(model, arguments)
    if fused_first:
        restore_(model)
        model.fuse_qkv_projections()
        linearize_(model, SMALL)
    else:
        model.fuse_qkv_projections()
    assert torch.allclose(run(model, arguments), windowed, atol=1e-5)
    with dense(model):
        assert torch.allclose(run(model, arguments), base, atol=1e-5)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, arguments), windowed)
    restore_(model)
    assert torch.equal(run(model, arguments), base)


@pytest.mark.parametrize("family", ["flux", "sd3", "unet"])
def test_training_requires_unfused_projections(family: str) -> None:
    model, arguments = _model(family), inputs_of(family)
    linearize_(model, SMALL)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections first"):
        add_lora_(model, rank=2)
    model.unfuse_qkv_projections()
    plain = run(model, arguments)
    trained = add_lora_(model, rank=2, targets=("to_q", "to_v"))
    with torch.no_grad():
        for factor in trained.values():
            factor.normal_()
    assert not torch.allclose(run(model, arguments), plain, atol=1e-3)
    with pytest.raises(ValueError, match="fuse_qkv_projections would copy trained projections"):
        model.fuse_qkv_projections()
