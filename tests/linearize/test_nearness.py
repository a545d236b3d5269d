"""Nearness: recorded predictions, 0 for the base, the error formula, and invalid input."""

import copy
from typing import Any

import pytest
import torch
from tiny_distill import build_tiny

from lineardit import Clear, linearize_, restore_
from lineardit.linearize.measures.nearness import Nearness, nearness, record_predictions
from lineardit.linearize.networks import denoiser

PROMPTS = ["a red circle", "a blue cross"]
SETTINGS: dict[str, Any] = {"size": (24, 32), "steps": 3, "max_sequence_length": 8}


def test_nearness_is_zero_for_the_base_and_tiny_for_a_covering_window() -> None:
    pipe = build_tiny()
    predictions = record_predictions(pipe, PROMPTS, **SETTINGS)
    assert len(predictions) == 6
    result = nearness(pipe, predictions)
    assert result.errors == (0, 0, 0)
    linearize_(pipe, Clear(radius=100))
    assert nearness(pipe, predictions).mean < 1e-9
    linearize_(pipe, Clear(radius=1.5))
    assert nearness(pipe, predictions).mean > 1e-6


def test_nearness_errors_match_the_formula() -> None:
    pipe = build_tiny()
    predictions = record_predictions(pipe, PROMPTS, **SETTINGS)
    other = copy.deepcopy(pipe)
    with torch.no_grad():
        other.transformer.proj_out.bias += 0.1
    result = nearness(other, predictions)
    for index, error in enumerate(result.errors):
        outputs = torch.cat([prediction.output for prediction in predictions if prediction.index == index])
        assert error == pytest.approx(0.01 / outputs.square().mean().item(), rel=1e-4)
    assert result.mean == pytest.approx(sum(result.errors) / 3)
    assert result.seconds > 0


def test_record_predictions_is_repeatable_and_leaves_no_hooks() -> None:
    pipe = build_tiny()
    first = record_predictions(pipe, PROMPTS[:1], **SETTINGS)
    again = record_predictions(pipe, PROMPTS[:1], **SETTINGS)
    _, model = denoiser(pipe)
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.output, same.output)
        assert torch.equal(one.arguments["hidden_states"], same.arguments["hidden_states"])
    assert not torch.equal(first[0].arguments["hidden_states"], first[1].arguments["hidden_states"])
    assert first[0].arguments["encoder_hidden_states"] is first[1].arguments["encoder_hidden_states"]
    assert not model._forward_hooks


def test_record_predictions_keeps_the_progress_bar_config() -> None:
    pipe = build_tiny()
    pipe.set_progress_bar_config(desc="mine", leave=False)
    record_predictions(pipe, PROMPTS[:1], **SETTINGS)
    assert pipe._progress_bar_config == {"desc": "mine", "leave": False}


def test_nearness_mean_averages_the_errors() -> None:
    assert Nearness(errors=(0.2, 0.4), seconds=1).mean == pytest.approx(0.3)


def test_nearness_refuses_invalid_input() -> None:
    pipe = build_tiny()
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        record_predictions(pipe, [], **SETTINGS)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        record_predictions(pipe, PROMPTS, **SETTINGS | {"steps": 0})
    with pytest.raises(ValueError, match="max_sequence_length must be >= 1, got -1"):
        record_predictions(pipe, PROMPTS, **SETTINGS | {"max_sequence_length": -1})
    predictions = record_predictions(pipe, PROMPTS, **SETTINGS)
    linearize_(pipe, Clear(radius=2))
    with pytest.raises(ValueError, match="pipe must be the original pipeline"):
        record_predictions(pipe, PROMPTS, **SETTINGS)
    restore_(pipe)
    pipe.transformer.proj_out = torch.nn.Linear(pipe.transformer.proj_out.in_features, 4)
    with pytest.raises(ValueError, match="the model must be a conversion of the base"):
        nearness(pipe, predictions)
