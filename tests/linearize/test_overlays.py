"""Trained weights on a base: disabled, enabled, removed, and together with the user's own LoRA."""

import copy
import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from trained import move_, train_full_, trained_

from lineardit import Clear, dense, linearize_, restore_
from lineardit.linearize.seam.conversion import overlays_of
from lineardit.linearize.weights.full_weights import replace_weights_
from lineardit.linearize.weights.low_rank import FusedLowRank, LowRank
from lineardit.linearize.weights.training import add_lora_
from tiny_models import build, inputs_of, run

CLEAR = Clear(radius=2)


@pytest.fixture(params=["lora", "full", "both"])
def student(request: pytest.FixtureRequest) -> tuple[nn.Module, dict, Tensor, Tensor]:
    """(trained model, arguments, output of the base, output of the student)."""
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    linearize_(model, CLEAR)
    trained_(model, request.param, alpha=3)
    return model, arguments, base, run(model, arguments)


def test_dense_gives_the_base_and_then_the_student_bit_for_bit(student) -> None:
    model, arguments, base, trained = student
    assert not torch.equal(base, trained)
    for _ in range(2):
        with dense(model), dense(model):
            assert torch.equal(run(model, arguments), base)
        assert torch.equal(run(model, arguments), trained)


@pytest.mark.parametrize("before", range(13))
def test_interrupted_dense_leaves_the_student_intact(before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    linearize_(model, CLEAR)
    changed = train_full_(model, targets=("to_q", "to_out.0"))
    move_(changed.values())
    trained, copy_ = run(model, arguments), Tensor.copy_
    count = itertools.count()

    def interrupted(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if next(count) == before:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt) if before < 2 * len(changed) else nullcontext(), dense(model):
            pass
    assert torch.equal(run(model, arguments), trained)
    with dense(model):
        assert torch.equal(run(model, arguments), base)
    assert torch.equal(run(model, arguments), trained)


def test_restore_gives_the_base_and_leaves_no_trace(student) -> None:
    model, arguments, base, _ = student
    names = set(build("flux").state_dict())
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    assert set(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == [type(module) for module in build("flux").modules()]


def test_restore_of_a_copy_made_inside_dense_gives_the_base(student) -> None:
    model, arguments, base, _ = student
    with dense(model):
        copied = copy.deepcopy(model)
    restore_(copied)
    assert torch.equal(run(copied, arguments), base)


def test_deepcopy_is_independent(student) -> None:
    model, arguments, base, trained = student
    copied = copy.deepcopy(model)
    restore_(model)
    assert torch.equal(run(copied, arguments), trained)
    with dense(copied):
        assert torch.equal(run(copied, arguments), base)
    assert torch.equal(run(copied, arguments), trained)


def test_user_lora_can_be_added_and_removed_without_changing_ours(student) -> None:
    model, arguments, base, trained = student
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), adapter_name="style")
    styled = run(model, arguments)
    assert not torch.equal(styled, trained)
    model.set_adapter("style")
    assert torch.equal(run(model, arguments), styled)
    with dense(model):
        dense_style = run(model, arguments)
    assert not torch.equal(dense_style, base)
    model.disable_adapters()
    assert torch.equal(run(model, arguments), trained)
    model.enable_adapters()
    model.unload_lora()
    assert torch.equal(run(model, arguments), trained)
    with dense(model):
        assert torch.equal(run(model, arguments), base)
    restore_(model)
    assert torch.equal(run(model, arguments), base)


def test_trained_weights_work_with_a_user_lora_already_loaded() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="style")
    styled = run(model, arguments)
    linearize_(model, CLEAR)
    move_(train_full_(model).values())
    move_(add_lora_(model, rank=2).values())
    with dense(model):
        assert torch.equal(run(model, arguments), styled)
    restore_(model)
    assert torch.equal(run(model, arguments), styled)
    model.unload_lora()
    assert torch.equal(run(model, arguments), base)


def test_linearize_again_keeps_trained_weights_with_a_warning(student, caplog: pytest.LogCaptureFixture) -> None:
    model, arguments, base, trained = student
    linearize_(model, Clear(radius=3))
    assert "for the previous conversion are kept: call restore_ first" in caplog.text
    assert not torch.equal(run(model, arguments), trained)
    linearize_(model, CLEAR)
    assert torch.equal(run(model, arguments), trained)
    restore_(model)
    assert torch.equal(run(model, arguments), base)
    caplog.clear()
    linearize_(model, CLEAR)
    linearize_(model, CLEAR)
    assert not caplog.text


def test_lora_matches_the_low_rank_formula(seed: int) -> None:
    model, x = build("flux"), torch.randn(3, 5, 32, dtype=torch.float64)
    model.double()
    linearize_(model, CLEAR)
    layer = model.transformer_blocks[0].attn.to_q
    plain = layer(x)
    parameters = add_lora_(model, rank=3, alpha=6, targets=["to_q"], dtype=torch.float64)
    assert torch.equal(layer(x), plain)
    move_(parameters.values())
    down, up = (parameters[f"transformer_blocks.0.attn.to_q.lineardit_lora.{end}"] for end in ("down", "up"))
    torch.testing.assert_close(layer(x), plain + 2 * x @ down.T @ up.T, rtol=0, atol=1e-12)


def test_lora_gradients_reach_only_its_factors() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, CLEAR)
    model.requires_grad_(False)
    parameters = add_lora_(model, rank=2)
    move_(parameters.values())
    model(**arguments)[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == list(parameters)


def test_fused_lora_matches_lora_and_refuses_restore_and_dense() -> None:
    model, arguments = build("flux").double(), inputs_of("flux")
    arguments = {name: value.double() for name, value in arguments.items()}
    linearize_(model, CLEAR)
    fused = copy.deepcopy(model)
    factors = {"transformer_blocks.0.attn.to_q": (torch.randn(2, 32).double(), torch.randn(32, 2).double())}
    overlays_of(model).items.append(LowRank(model, factors, alpha=4))
    overlays_of(fused).items.append(FusedLowRank(fused, factors, alpha=4))
    torch.testing.assert_close(run(fused, arguments), run(model, arguments), rtol=0, atol=1e-6)
    before = run(fused, arguments)
    for undo in (restore_, lambda model: dense(model).__enter__()):
        with pytest.raises(ValueError, match="keep_original=True"):
            undo(fused)
        assert torch.equal(run(fused, arguments), before)


def test_replace_weights_without_originals_refuses_restore_and_dense() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, CLEAR)
    replace_weights_(model, {"transformer_blocks.0.attn.to_q.weight": torch.randn(32, 32)}, keep_original=False)
    before = run(model, arguments)
    for undo in (restore_, lambda model: dense(model).__enter__()):
        with pytest.raises(ValueError, match="keep_original=True"):
            undo(model)
        assert torch.equal(run(model, arguments), before)


def test_changed_weights_remain_the_optimizer_parameters() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, CLEAR)
    parameters = train_full_(model, targets=["to_v"])
    optimizer = torch.optim.SGD(parameters.values(), lr=1)
    with dense(model), torch.no_grad():
        target = model(**arguments)[0]
    (model(**arguments)[0] - target).square().sum().backward()
    before = run(model, arguments)
    optimizer.step()
    assert not torch.equal(run(model, arguments), before)
    with dense(model):
        assert torch.equal(run(model, arguments), target)


def test_stacked_changes_are_undone_in_reverse_order() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    linearize_(model, CLEAR)
    for _ in range(2):
        move_(train_full_(model, targets=["to_q"]).values())
    trained = run(model, arguments)
    with dense(model):
        assert torch.equal(run(model, arguments), base)
    assert torch.equal(run(model, arguments), trained)
    restore_(model)
    assert torch.equal(run(model, arguments), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lora_computes_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    model = build("flux")
    linearize_(model, CLEAR)
    model.to(dtype)
    move_(add_lora_(model, rank=2, dtype=torch.float32).values())
    assert model.transformer_blocks[0].attn.to_q(torch.randn(2, 32, dtype=dtype)).dtype == dtype


def test_compiled_layer_with_lora_follows_dense() -> None:
    model, x = build("flux"), torch.randn(3, 32)
    layer = model.transformer_blocks[0].attn.to_q
    compiled = torch.compile(lambda x: layer(x), backend="eager", fullgraph=True)
    base = compiled(x)
    linearize_(model, CLEAR)
    move_(add_lora_(model, rank=2, targets=["to_q"]).values())
    trained = layer(x)
    for _ in range(2):
        assert torch.equal(compiled(x), trained)
        with dense(model):
            assert torch.equal(compiled(x), base)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"rank": 2, "targets": ["to_x"]}, "targets must be layers of the swapped attention modules, got 'to_x'"),
    ],
)
def test_add_lora_refuses_invalid_options_and_unconverted_models(options: dict, text: str) -> None:
    model = build("flux")
    with pytest.raises(ValueError, match="not converted" if options["rank"] else "rank"):
        add_lora_(model, **options)
    linearize_(model, CLEAR)
    with pytest.raises(ValueError, match=text):
        add_lora_(model, **options)


def test_add_lora_refuses_a_second_one() -> None:
    model = build("flux")
    linearize_(model, CLEAR)
    add_lora_(model, rank=2, targets=["to_q"])
    with pytest.raises(ValueError, match="already has a trainable LoRA"):
        add_lora_(model, rank=2, targets=["to_k"])


def test_fusing_projections_and_trained_weights_exclude_each_other(student) -> None:
    model, arguments, _, trained = student
    with pytest.raises(ValueError, match="keep_original=False"):
        model.fuse_qkv_projections()
    assert torch.equal(run(model, arguments), trained)
    restore_(model)
    linearize_(model, CLEAR)
    model.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections first"):
        add_lora_(model, rank=2)
