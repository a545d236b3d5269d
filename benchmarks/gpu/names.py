"""Names of cases and implementations in the file; without torch, so that reading results does not need it."""

SIZE_NAMES = {64: "1K", 128: "2K", 256: "4K", 512: "8K"}  # side in tokens -> picture of FLUX.1
DENSE = ("dense cuDNN", "dense flash")
CLEAR_FLEX = "flex row-major"
PORTABLE = "ours without Triton"
DENSE_STEP, CLEAR_STEP = "dense", "CLEAR's way, radius 8"
OUR_STEPS = {radius: f"ours, radius {radius}" for radius in (8, 16)}
HYBRID_STEP = f"{OUR_STEPS[8]}, and 256 proxies"
FOCUS_STEP = f"{OUR_STEPS[16]}, 1024 proxies, 1024 tokens in focus"
IN_CHUNKS = f"{OUR_STEPS[8]}, in chunks"  # token-wise layers on some tokens at a time
ALL_WEIGHTS = "first blocks, with all weights in memory"  # the note of such a row


def size_name(side: int) -> str:
    """ "4K" for 256 tokens a side; one token is 16 x 16 pixels."""
    return SIZE_NAMES.get(side, f"{16 * side} px")


def case_name(side: int, radius: int | None, *, backward: bool) -> str:
    """ "4K, radius 16, forward + backward"; dense attention has no radius."""
    window = [] if radius is None else [f"radius {radius}"]
    return ", ".join([size_name(side), *window, "forward + backward" if backward else "forward"])
