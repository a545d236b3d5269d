"""One-sentence errors: kept calls that do not fit, are damaged or cannot be made, and runs that end early."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers import FluxPipeline
from kept_case import config_of, kept
from prompted import prompted, size_of
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tiny_distill import PROMPTS, SIZES, write_config
from torch.distributed import HashStore

from lineardit.distill import train
from lineardit.distill.__main__ import main
from lineardit.distill.calls import pack
from lineardit.distill.data import TeacherSamples
from lineardit.distill.prepare import prepare


def test_settings_that_do_not_fit_kept_calls_are_refused(base: Path, pipe: FluxPipeline, tmp_path: Path) -> None:
    kept(pipe, tmp_path / "samples", SIZES[0], max_sequence_length=8)
    with pytest.raises(
        ValueError, match=r"loss.flow must be 0 for .*samples, which holds calls of the teacher's model"
    ):
        train.distill(config_of(tmp_path, str(base), loss={"flow": 1.0}))
    with pytest.raises(
        ValueError, match=r"base.dtype must be float32, in which the calls in .*prepare --dtype bfloat16"
    ):
        train.distill(config_of(tmp_path, str(base), "bfloat16", run={"mixed_precision": "bf16"}))
    with pytest.raises(ValueError, match=r"noise must be left out for .*, whose calls already contain noise"):
        train.distill(config_of(tmp_path, str(base), noise={"mean": 1.0}))
    assert not (tmp_path / "run").exists()


def test_calls_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    pipe, size = prompted("sd3"), size_of("sd3")
    with pytest.raises(ValueError, match=r"calls must be <= 2, the number of calls in 2 steps"):
        kept(pipe, tmp_path / "samples", size, calls=3)
    message = "final latents are supported for FluxTransformer2DModel, got a SD3Transformer2D"
    with pytest.raises(ValueError, match=message):
        kept(pipe, tmp_path / "samples", size, calls=0)
    with pytest.raises(ValueError, match=r"final latents are made without other arguments: record calls"):
        prepare(pipe, PROMPTS, tmp_path / "samples", calls=0, arguments={"negative_prompt": "x"})
    with pytest.raises(ValueError, match=r"calls must be >= 0, got -1"):
        kept(pipe, tmp_path / "samples", size, calls=-1)
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline takes no|multiples of 4 pixels for this model"):
        kept(pipe, tmp_path / "samples", (17, 16))
    pipe.transformer.half()
    with pytest.raises(ValueError, match=r"calls must be made in float32 or bfloat16, .* got torch.float16"):
        kept(pipe, tmp_path / "samples", size)
    with pytest.raises(ValueError, match=r"its argument cache is a object"):
        pack([{"cache": object()}], "0")
    assert not list((tmp_path / "samples").glob("*.safetensors"))


def test_samples_of_a_model_with_other_shapes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(prompted("sd"), tmp_path / "samples", size_of("sd"))
    monkeypatch.setattr(train, "load_teacher", lambda _: prompted("sdxl"))
    with pytest.raises(ValueError, match=r"was made by another UNet2D.*, but base.model is a .* of other shapes"):
        train.distill(config_of(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, _: tensors.pop("00000001.0"), "cannot be read"),
        (lambda _, texts: texts.pop("00000001"), "cannot be read"),
        (lambda _, texts: texts.update({"00000001": "[1]"}), "cannot be read"),
        (lambda tensors, _: tensors["00000001.0"].fill_(float("nan")), "sample 1 contains NaN"),
    ],
)
def test_damaged_shard_is_named_in_the_error(damage: Any, message: str, tmp_path: Path) -> None:
    samples = kept(prompted("sd3"), tmp_path / "samples", size_of("sd3"))
    file = tmp_path / "samples" / "shard-00000.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as shard:
        texts = shard.metadata()
    damage(tensors, texts)
    save_file(tensors, file, metadata=texts)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors cannot be read") as raised:
        samples.call(1, 0)
    assert message in str(raised.value) and "run `lineardit prepare` again" in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index["settings"].update(shard_size=0),
        lambda index: index["settings"].update(calls="many"),
        lambda index: index["settings"].pop("num_prompts"),
        lambda index: index.update(shards={}),
        lambda index: index["shards"][0].pop("file"),
        lambda index: index["shards"][0].update(file="../../etc/passwd"),
        lambda index: index["shards"][0]["samples"][0].pop("prompt"),
    ],
)
def test_damaged_index_is_named_in_the_error(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    kept(prompted("sd3"), folder, size_of("sd3"))
    index = json.loads((folder / "index.json").read_text())
    damage(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is damaged: remove it, and run `lineardit prepare` again"):
        TeacherSamples(folder)


def test_full_disk_error_names_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = Mock(side_effect=SafetensorError("No space left on device"))
    monkeypatch.setattr("lineardit.distill.shards.save_file", full)
    with pytest.raises(OSError, match=r"shard-00000.safetensors cannot be written: No space left"):
        kept(prompted("sd3"), tmp_path / "samples", size_of("sd3"))
    assert not (tmp_path / "samples").exists()


def test_min_tokens_above_every_level_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(prompted("sd"), tmp_path / "samples", size_of("sd"))
    monkeypatch.setattr(train, "load_teacher", lambda _: prompted("sd"))
    with pytest.raises(ValueError, match=r"min_tokens must be <= \d+: the levels have \d+"):
        train.distill(config_of(tmp_path, run={"min_tokens": 10**6}))


def test_interrupted_run_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lineardit.distill.train.distill", Mock(side_effect=KeyboardInterrupt))
    assert main([str(write_config(config_of(tmp_path), tmp_path / "config.toml"))]) == 130
    assert "interrupted; --resume latest continues" in capsys.readouterr().err


def test_out_of_memory_message_names_settings_that_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(config_of(tmp_path), tmp_path / "config.toml"))
    monkeypatch.setattr("lineardit.distill.train.distill", Mock(side_effect=torch.OutOfMemoryError("CUDA ...")))
    assert main([config]) == 1
    message = capsys.readouterr().err
    assert "out of memory: CUDA ...; raise run.gradient_accumulation" in message
    assert "base.dtype" not in message.partition("--resume latest")[0]  # a resumed run must keep it
    monkeypatch.setattr("lineardit.distill.train.distill", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        main([config])


def test_exit_message_is_left_to_the_failed_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher usually ends it while it waits; otherwise it raises its own error."""
    config, sleep = str(write_config(config_of(tmp_path), tmp_path / "config.toml")), Mock()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("time.sleep", sleep)
    connection_error = RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:48788")
    monkeypatch.setattr("lineardit.distill.train.distill", Mock(side_effect=connection_error))
    with pytest.raises(RuntimeError, match="closed by peer"):
        main([config])
    sleep.assert_called_once_with(10)
    assert not capsys.readouterr().err


def test_out_of_memory_in_several_processes_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, sleep, store = str(write_config(config_of(tmp_path), tmp_path / "config.toml")), Mock(), HashStore()
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("lineardit.distill.train.distill", Mock(side_effect=torch.OutOfMemoryError("CUDA ...")))
    assert [main([config]), main([config])] == [1, 1]
    assert capsys.readouterr().err.count("out of memory") == 1
    sleep.assert_called_once_with(10)
