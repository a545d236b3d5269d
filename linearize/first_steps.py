"""Linear attention for the first steps of a pipeline's denoising, the base's attention for the rest."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from .convert import check_dense, dense

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


@contextmanager
def first_steps(pipe: Any, count: int) -> Iterator[OnStepEnd]:
    """Context manager whose callback switches a pipeline to the base, as `dense` does, from step `count` on.

        with first_steps(pipe, 20) as on_step_end:
            pipe(prompt, num_inference_steps=50, callback_on_step_end=on_step_end)

    The pipeline counts the steps, so every call starts with linear attention again.

    Args:
        pipe: A pipeline after `linearize_`.
        count: Number of steps with linear attention, >= 1.
    Yields:
        A `callback_on_step_end` for the pipeline; a callback of your own can call it with its arguments.
    Raises:
        ValueError: count < 1, nothing is converted, or the base cannot be restored.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, got {count}: to use no linear attention, use `dense`")
    check_dense(pipe)
    with ExitStack() as base, _before_each_schedule(pipe.scheduler, base.close):

        def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if step + 1 == count:
                base.enter_context(dense(pipe))
            if step + 1 >= pipeline.num_timesteps:
                base.close()
            return tensors

        yield on_step_end


@contextmanager
def _before_each_schedule(scheduler: Any, run: Callable[[], None]) -> Iterator[None]:
    """Context manager that calls `run` before `set_timesteps`, which begins a call: the last one may have failed."""
    base: Any = type(scheduler)

    @wraps(base.set_timesteps)  # pipelines inspect its parameters
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        run()
        return base.set_timesteps(self, *args, **kwargs)

    # a subclass, not an instance attribute: copies of the scheduler must set their own timesteps
    scheduler.__class__ = type(base.__name__, (base,), {"set_timesteps": set_timesteps, "__module__": base.__module__})
    try:
        yield
    finally:
        scheduler.__class__ = base
