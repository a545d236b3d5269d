"""Peak memory of the operator and of a model step, ours against dense; in eager mode, which takes more."""

import importlib.util
from contextlib import nullcontext
from functools import partial
from itertools import product

import torch

from .bench import Bench, Measurement, Task, Tasks, shape_of
from .competitors import COMPETITORS, Competitor, ours
from .model_step import CachedModel
from .names import ALL_WEIGHTS, DENSE, DENSE_STEP, IN_CHUNKS, OUR_STEPS, case_name, size_name
from .timing import peak_gib

PART = "memory"
SIDES = (256, 512)
RADIUS = 8


def tasks(bench: Bench) -> Tasks:
    scale = bench.scale
    sides = [side for side in SIDES if side in scale.sides] or list(scale.sides)
    for backward, side in product((False, True), sides):
        radius = RADIUS if RADIUS in scale.radii else scale.radii[0]
        calls: dict[str, Competitor] = {DENSE[1]: COMPETITORS[DENSE[1]], bench.impl: ours}
        for name, competitor in calls.items():
            measure = partial(operator_peak, bench, side, radius, competitor, backward=backward)
            case = f"operator, {case_name(side, radius, backward=backward)}"
            yield Task(part=PART, case=case, impl=name, measure=measure)
    if importlib.util.find_spec("diffusers") is None:
        return
    cached = CachedModel(bench, compiled=False)
    for impl, side in product((DENSE_STEP, OUR_STEPS[RADIUS], IN_CHUNKS), sides):
        measure = partial(step_peak, bench, cached, impl, side)
        yield Task(part=PART, case=f"step, {size_name(side)}", impl=impl, measure=measure)


def operator_peak(bench: Bench, side: int, radius: int, competitor: Competitor, *, backward: bool) -> Measurement:
    """Peak memory, inputs included."""
    shape = shape_of(bench.scale, side, radius)
    attention = competitor(shape, bench, backward=backward)
    inputs = shape.tensors(bench.device, requires_grad=backward)

    def run() -> None:
        outs = attention.call(*inputs)
        if backward:
            torch.autograd.grad(outs, inputs, [torch.ones_like(out) for out in outs])

    return Measurement(figures={"peak_gib": peak_gib(run, bench.device)})


def step_peak(bench: Bench, cached: CachedModel, impl: str, side: int) -> Measurement:
    """Blocks free what they allocate, so the first of each kind show the peak; all weights are in memory."""
    from lineardit.pipelines.estimate import CHUNK_TOKENS
    from lineardit.pipelines.token_chunks import in_token_chunks

    from . import flux

    model = cached.converted(OUR_STEPS[RADIUS] if impl == IN_CHUNKS else impl)
    run = flux.step(model, bench.scale, side)
    chunks = in_token_chunks(model, CHUNK_TOKENS) if impl == IN_CHUNKS else nullcontext()
    with flux.first_units(model, 1), chunks:
        peak = peak_gib(run, bench.device)
    note = ALL_WEIGHTS
    if cached.units < cached.total_units:
        note = f"first blocks, with the weights of {cached.units} of {cached.total_units} units, which is what fits"
    return Measurement(figures={"peak_gib": peak}, note=note)
