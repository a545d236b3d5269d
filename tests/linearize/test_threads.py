"""A converted model serves one thread at a time: concurrent use is refused, not mixed up."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lineardit import Clear, dense, linearize_
from lineardit.linearize.seam.conversion import conversion_of
from tiny_models import build, inputs_of, run

SMALL = Clear(radius=2.3)


def in_a_thread(call: Callable[[], Tensor]) -> Tensor:
    """Result of `call` in a new thread."""
    results: list[Tensor] = []
    worker = threading.Thread(target=lambda: results.append(call()))
    worker.start()
    worker.join()
    return results[0]


@contextmanager
def held_inside(model: Any, call: Callable[[], Tensor]) -> Iterator[list[Tensor]]:
    """Hold a second thread inside `call` during the block; its result is in the list afterwards."""
    inside, proceed, results = threading.Event(), threading.Event(), []

    @torch.compiler.disable
    def wait(*_: object) -> None:
        if threading.current_thread() is worker:
            inside.set()
            proceed.wait(60)

    model.single_transformer_blocks[0].register_forward_pre_hook(wait)
    worker = threading.Thread(target=lambda: results.append(call()))
    worker.start()
    assert inside.wait(60)
    yield results
    proceed.set()
    worker.join()


def test_second_thread_in_one_model_is_refused() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)
    with held_inside(model, lambda: run(model, arguments)) as results:
        conversion_of(model).saved_layouts = layouts = {}  # as with gradient checkpointing
        with pytest.raises(RuntimeError, match="another thread"):
            run(model, inputs_of("flux", grid=(4, 4)))
        assert conversion_of(model).saved_layouts is layouts
    assert torch.equal(results[0], out)
    assert torch.equal(run(model, arguments), out)


@pytest.mark.parametrize("second", ["replica", "compiled"])
def test_replica_or_compiled_form_is_refused_while_another_thread_runs(second: str) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    other: Any = torch.compile(model, backend="eager") if second == "compiled" else copy.copy(model)
    if second == "replica":
        other.__dict__ = {**vars(model)}  # as nn.DataParallel does: both share one conversion
    first_model, second_model = (other, model) if second == "compiled" else (model, other)
    with (
        held_inside(model, lambda: run(first_model, arguments)),
        pytest.raises(RuntimeError, match="another thread is running this converted model"),
    ):
        run(second_model, inputs_of("flux", grid=(4, 4)))


def test_copy_made_inside_dense_works_in_every_thread() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    base = run(model, arguments)
    linearize_(model, SMALL)
    with dense(model):
        copied = copy.deepcopy(model)
    assert torch.equal(in_a_thread(lambda: run(copied, arguments)), base)
    assert not torch.allclose(run(model, arguments), base, atol=1e-4)


def test_dense_refuses_other_threads() -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)
    refused: list[RuntimeError] = []

    def in_other_thread() -> None:
        for call in (lambda: run(model, arguments), dense(model).__enter__):
            try:
                call()
            except RuntimeError as error:
                refused.append(error)

    with dense(model):
        worker = threading.Thread(target=in_other_thread)
        worker.start()
        worker.join()
        assert not torch.allclose(run(model, arguments), out, atol=1e-4)
    assert ["another thread is inside `dense` of this model" in str(error) for error in refused] == [True, True]
    assert torch.equal(run(model, arguments), out)


@pytest.mark.parametrize("compiled", [False, True])
def test_interrupted_forward_releases_the_model_for_other_threads(compiled: bool) -> None:
    model, arguments = build("flux"), inputs_of("flux")
    linearize_(model, SMALL)
    out = run(model, arguments)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model.single_transformer_blocks[0].register_forward_pre_hook(interrupt)
    called: Any = torch.compile(model, backend="eager") if compiled else model
    with pytest.raises(KeyboardInterrupt):
        run(called, arguments)
    handle.remove()
    assert torch.equal(in_a_thread(lambda: run(model, arguments)), out)
