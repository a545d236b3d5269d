"""A process group of forks of this process, which have everything imported already."""

import traceback
from collections.abc import Callable
from pathlib import Path

import torch


def run_forks(count: int, enter: Callable[[int], None], folder: Path) -> None:
    """Call `enter(rank)` in `count` forks; an exception fails the test, and is reported through the folder."""
    context = torch.multiprocessing.get_context("fork")
    forks = [context.Process(target=_run_rank, args=(rank, enter, folder)) for rank in range(count)]
    for fork in forks:
        fork.start()
    for fork in forks:
        fork.join(timeout=60)
        fork.kill()
        fork.join()
    errors = [file.read_text() for file in sorted(folder.glob("error-*"))]
    assert [fork.exitcode for fork in forks] == [0] * count, "\n".join(errors)


def _run_rank(rank: int, enter: Callable[[int], None], folder: Path) -> None:
    try:
        enter(rank)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        torch.distributed.destroy_process_group()
