"""Targets on an H200, and what others published, for their cards, versions and protocols."""

from .names import ALL_WEIGHTS, CLEAR_FLEX, IN_CHUNKS, OUR_STEPS, case_name, size_name
from .records import Mark, Results

FOUR_K, EIGHT_K, ONE_K = 256, 512, 64
PUBLISHED = (
    "FLUX at 4K, one layer, H100: cuDNN 97.4 ms; GNA, window 80x80, no text, permutation included 10.6 ms (NATTEN)",
    "the same by CLEAR, implied by its step times: about 28, 40, 63 ms for radius 8, 16, 32",
    "FLUX.1-dev, one step, H100, seconds at 1K, 2K, 4K, 8K (CLEAR): dense 0.22, 1.05, 7.45, 92.1; "
    "radius 8 0.22, 0.78, 3.47, 14.7; radius 16 0.23, 0.86, 4.16, 18.0; radius 32 0.27, 1.00, 5.48, 24.8",
)


def marks(results: Results) -> list[Mark]:
    return [*_operator_marks(results), *_model_marks(results), *_memory_marks(results)]


def _operator_marks(results: Results) -> list[Mark]:
    impl = results.head.impl

    def milliseconds(side: int, radius: int, name: str, *, backward: bool = False) -> float | None:
        return results.figure("operator", case_name(side, radius, backward=backward), name, "milliseconds")

    def times_clear(side: int, radius: int) -> float | None:
        ours, theirs = milliseconds(side, radius, impl), milliseconds(side, radius, CLEAR_FLEX)
        return None if ours is None or theirs is None else theirs / ours

    forward, both = (milliseconds(FOUR_K, 16, impl, backward=backward) for backward in (False, True))
    share = None if forward is None or both is None else (both - forward) / forward
    what = "operator, 4K, radius 16, forward"
    best = "10.6 (GNA, a larger window, no text), about 40 (CLEAR)"
    return [
        _lower(f"{what}: milliseconds, target", forward, 6.5, best),
        _lower(f"{what}: milliseconds, floor", forward, 9, best),
        _higher(f"{what}: times faster than CLEAR's way", times_clear(FOUR_K, 16), 3),
        _higher("operator, 8K, radius 8, forward: times faster than CLEAR's way", times_clear(EIGHT_K, 8), 3.5),
        _lower("operator, 4K, radius 16: backward over forward", share, 4),
    ]


def _model_marks(results: Results) -> list[Mark]:
    def speedup(side: int, radius: int) -> float | None:
        return results.figure("model", size_name(side), OUR_STEPS[radius], "speedup")

    return [
        _higher("step, 4K, radius 8: times faster than dense", speedup(FOUR_K, 8), 3.8, "2.15 (CLEAR), 3.4 (STA)"),
        _higher(
            "step, 8K, radius 8: times faster than dense",
            speedup(EIGHT_K, 8),
            12,
            "6.3 (CLEAR), 10.8 in total (UltraGen)",
        ),
        _higher("step, 1K, radius 8: times faster than dense", speedup(ONE_K, 8), 0.98, "1.01 (CLEAR)"),
        _higher("step, 1K, radius 16: times faster than dense", speedup(ONE_K, 16), 0.98, "0.98 (CLEAR)"),
    ]


def _memory_marks(results: Results) -> list[Mark]:
    def gib(side: int, impl: str) -> float | None:
        case = f"step, {size_name(side)}"
        row = results.find("memory", case, impl)
        if row is None or row.note != ALL_WEIGHTS:
            return None  # with a part of the weights, it says nothing about the whole
        return results.figure("memory", case, impl, "peak_gib")

    return [
        _lower("step, 8K, radius 8: GiB, without offload", gib(EIGHT_K, OUR_STEPS[8]), 60),
        _lower("step, 8K, radius 8, in chunks: GiB", gib(EIGHT_K, IN_CHUNKS), 40),
        _lower("step, 4K, radius 8: GiB", gib(FOUR_K, OUR_STEPS[8]), 34, "39.7 for its whole run (UltraGen)"),
    ]


def _higher(what: str, value: float | None, target: float, published: str = "") -> Mark:
    return Mark(what=what, value=value, target=target, better="higher", published=published)


def _lower(what: str, value: float | None, target: float, published: str = "") -> Mark:
    return Mark(what=what, value=value, target=target, better="lower", published=published)
