"""What a model costs on this machine: seconds of one warm transformer forward, peak memory of one picture."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from ..linearize.measures.recording import first_call, predict
from ..linearize.networks import denoiser
from ..pipelines.sizes import size_multiple
from .latent_functions import latent_functions
from .launch import child_environment
from .pictures import PictureSettings, decodes_separately, denoise, draw_in_one_call

GIB = 2**30
PROMPT = "a red circle at the top left on striped sand"  # cost does not depend on the words


def step_call(pipe: Any, settings: PictureSettings) -> Callable[[], None]:
    """A function that repeats the denoiser's first call for one picture of this size."""
    _, model = denoiser(pipe)
    device = pipe._execution_device  # `pipe.device` is the CPU if offloaded
    pipe.set_progress_bar_config(disable=True)
    arguments = first_call(pipe, prompt=PROMPT, generator=torch.Generator("cpu").manual_seed(0), **settings.call(pipe))

    def step() -> None:
        with torch.no_grad():
            predict(model, arguments)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # not necessarily the current device

    return step


def time_call(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_seconds(pipe: Any, settings: PictureSettings) -> float:
    """Median over five forwards, after one warm-up."""
    step = step_call(pipe, settings)
    step()
    return median(time_call(step) for _ in range(5))


def paired_step_seconds(
    first: Any, second: Any, settings: PictureSettings, *, pairs: int = 5
) -> list[tuple[float, float]]:
    """Seconds of alternating forwards of two pipelines, so that both see the same machine load; one warm-up each."""
    steps = step_call(first, settings), step_call(second, settings)
    for step in steps:
        step()
    return [(time_call(steps[0]), time_call(steps[1])) for _ in range(pairs)]


def picture_peak(pipe: Any, settings: PictureSettings) -> float:
    """Peak memory of one picture in GiB: on a GPU all that torch allocates, on a CPU the growth of resident memory.

    On a CPU, call it in a fresh process (`picture_peak_in_subprocess`): memory freed by earlier work would be reused
    and not measured. A very small picture is drawn first, so that weights and libraries are loaded.
    """
    small = min(4 * size_multiple(pipe), settings.size[0])
    device = pipe._execution_device
    _draw(pipe, replace(settings, height=small, width=small))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        _draw(pipe, settings)
        return torch.cuda.max_memory_allocated(device) / GIB
    with resident_peak() as peak:
        _draw(pipe, settings)
    return peak[0] / GIB


def _draw(pipe: Any, settings: PictureSettings) -> None:
    """Draw one picture in two steps: a third needs no more memory."""
    settings = replace(settings, steps=2)
    pipe.set_progress_bar_config(disable=True)
    if not decodes_separately(pipe, settings):
        draw_in_one_call(pipe, [PROMPT], [0], settings)
        return
    functions = latent_functions(denoiser(pipe)[1])
    grid = functions.grid(pipe, *settings.size)
    with torch.no_grad():
        latents = denoise(pipe, [PROMPT], [0], settings.with_defaults(pipe))
        functions.decode(pipe, latents, grid)


@contextmanager
def resident_peak() -> Iterator[list[int]]:
    """Yield a list that holds, on exit, the peak growth of this process's resident memory in bytes.

    Linux's high-water mark is exact; where it cannot be reset, a thread samples every 2 ms.
    """
    process, done, peak = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss
    if _reset_high_water_mark():
        try:
            yield peak
        finally:
            peak[0] = max(0, _high_water_mark() - before)
        return

    def watch() -> None:
        while not done.wait(0.002):  # seconds
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _reset_high_water_mark() -> bool:
    """Reset Linux's high-water mark of this process; False if that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _high_water_mark() -> int:
    """Linux's high-water mark of resident memory, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
    return 1024 * int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0])


def picture_peak_in_subprocess(open_arguments: dict[str, Any], settings: PictureSettings) -> float:
    """`picture_peak` in a fresh process.

    Args:
        open_arguments: Arguments of `open_named`.
    """
    request = json.dumps({"opening": open_arguments, "settings": asdict(settings)})
    command = [sys.executable, "-m", "lineardit.distill.cost", request]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the peak memory of {open_arguments['name']} failed:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def open_named(open_arguments: Mapping[str, Any]) -> Any:
    """`open_pipeline` with JSON arguments: the dtype by its name, the quantization as a dictionary."""
    from ..linearize.adapters.opening import named_dtype, open_pipeline
    from ..linearize.adapters.quantization import Quantization

    quantization = open_arguments.get("quantization")
    converted = {
        "dtype": named_dtype(open_arguments["dtype"]),
        "quantization": quantization and Quantization(**quantization),
    }
    return open_pipeline(**{**open_arguments, **converted})


def main() -> None:
    """Print the peak for the pipeline and settings in the first argument, which is JSON."""
    request = json.loads(sys.argv[1])
    pipe = open_named(request["opening"])
    sys.stdout.write(f"{picture_peak(pipe, PictureSettings(**request['settings']))}\n")


if __name__ == "__main__":
    main()
