"""Communication between the processes of a launch, in forks of this one."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from forks import run_forks
from torch import nn

from lineardit.distill import processes
from lineardit.distill.config import DistillConfig
from lineardit.distill.data import TeacherSamples
from lineardit.distill.diverged import DivergedError
from lineardit.distill.processes import average_gradients, broadcast_tensors, on_main, raise_together, start_accelerator
from lineardit.distill.train import _check_same_samples
from lineardit.distill.trainer import Trainer

PROCESSES = 2


def _in_processes(work: Callable[[Accelerator], None], folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def enter(rank: int) -> None:
        launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in (launched | {"MASTER_PORT": port}).items()})
        AcceleratorState._reset_state(True)  # the parent process may have created one
        work(start_accelerator())

    run_forks(PROCESSES, enter, folder)


@pytest.mark.parametrize("bucket", [1, 4, 2**25])
def test_average_gradients_treats_a_missing_gradient_as_zero(
    bucket: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BUCKET_SIZE", bucket)

    def work(accelerator: Accelerator) -> None:
        rank = accelerator.process_index
        everywhere, second, nowhere, last = (nn.Parameter(torch.zeros(size)) for size in ((2, 3), (3,), (1,), ()))
        everywhere.grad = torch.arange(6.0).view(2, 3).T.contiguous().T * (rank + 1)  # in another memory layout
        second.grad = torch.tensor([2.0, 4.0, 6.0]) if rank else None
        last.grad = torch.tensor(float(rank))
        average_gradients(accelerator, [everywhere, second, nowhere, last])
        assert torch.equal(everywhere.grad, 1.5 * torch.arange(6.0).view(2, 3))
        assert second.grad is not None
        assert second.grad.tolist() == [1, 2, 3]
        assert nowhere.grad is None
        assert last.grad == 0.5

    _in_processes(work, tmp_path)


def test_tensors_results_and_errors_reach_all_processes(tmp_path: Path) -> None:
    def work(accelerator: Accelerator) -> None:
        expected = {"a.step": torch.tensor(7.0), "a": torch.arange(6).view(2, 3).bfloat16(), "empty": torch.zeros(0)}
        tensors = expected if accelerator.is_main_process else {}
        received = dict(broadcast_tensors(accelerator, tensors))
        assert list(received) == list(expected)
        assert all(
            torch.equal(received[name], tensor) and received[name].dtype == tensor.dtype
            for name, tensor in expected.items()
        )
        assert on_main(accelerator, lambda: accelerator.process_index) == 0
        for raised, error in ((ValueError, ValueError), (PermissionError, OSError), (DivergedError, DivergedError)):
            with pytest.raises(error, match="process 0 says no"):
                on_main(accelerator, partial(_refuse, accelerator.process_index, raised))

        with pytest.raises(OSError, match=r"^runs: Permission denied"):
            on_main(accelerator, Mock(side_effect=PermissionError(13, "Permission denied", "runs")))
        for ranks, message in (({0, 1}, "^process [01] says no"), ({1}, "^process 1 of 2: process 1 says no")):
            with pytest.raises(ValueError, match=message), raise_together(accelerator):
                if accelerator.process_index in ranks:
                    _refuse(accelerator.process_index, ValueError)
        with raise_together(accelerator):
            pass

    _in_processes(work, tmp_path)


def _refuse(rank: int, error: type[Exception]) -> None:
    raise error(f"process {rank} says no")


def test_diverged_run_names_the_checkpoint_of_the_main_process(
    make_config: Callable[..., DistillConfig], tmp_path: Path
) -> None:
    """Other processes may run on machines without one."""
    (tmp_path / "0" / "step-00000002").mkdir(parents=True)
    (tmp_path / "0" / "step-00000002" / "checkpoint.json").write_text('{"files": {}}')

    def work(accelerator: Accelerator) -> None:
        trainer = object.__new__(Trainer)
        trainer.accelerator, trainer.started = accelerator, 0
        trainer.config = make_config(run={"directory": str(tmp_path / str(accelerator.process_index))})
        trainer._check_finite({"flow": 1.0}, 5)
        with pytest.raises(DivergedError, match=r"flow is inf at step 5; continue from .*0/step-00000002"):
            trainer._check_finite({"flow": float("inf")}, 5)

    _in_processes(work, tmp_path)


def test_different_samples_in_one_process_are_refused_by_all(tmp_path: Path) -> None:
    def work(accelerator: Accelerator) -> None:
        samples = SimpleNamespace(fingerprint=f"made on {accelerator.process_index}", directory="samples")
        message = "same samples for all processes; those of process 1 differ from those of process 0"
        with pytest.raises(ValueError, match=message):
            _check_same_samples(accelerator, cast(TeacherSamples, samples))
        samples.fingerprint = "copied"
        _check_same_samples(accelerator, cast(TeacherSamples, samples))

    _in_processes(work, tmp_path)


def test_start_accelerator_sets_a_timeout_for_large_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Mock(return_value=SimpleNamespace(num_processes=1))
    monkeypatch.setattr(processes, "Accelerator", make)
    start_accelerator()
    (handler,) = make.call_args.kwargs["kwargs_handlers"]
    assert handler.to_kwargs()["timeout"] == processes.TIMEOUT
