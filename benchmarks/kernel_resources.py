"""Registers, spills, shared memory and narrow loads of the Triton kernels, compiled for GPUs that need not be present.

    python benchmarks/kernel_resources.py            compare with the committed table; exit code 1 on growth
    python benchmarks/kernel_resources.py --write    write the table
    python benchmarks/kernel_resources.py --archs 80 86 90 100 120

bfloat16, head dimension 128 (FLUX.1), the forward also 72 (PixArt), where heads are not at multiples of 16 elements.
For each architecture, the first tiles that fit into its shared memory, as at run time. The numbers depend on the
version of Triton, which the table records; under another version nothing is compared.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lineardit.kernels.focus import triton_kernels as focus_kernels
from lineardit.kernels.focus.triton_focus import (
    BLOCK_ROWS,
    Blocks,
    backward_candidates,
    key_warps,
    query_slots,
    query_warps,
)
from lineardit.kernels.focus.triton_focus import candidates as focus_candidates
from lineardit.kernels.pieces.launch import STRIDE_UNIT, block_d
from lineardit.kernels.window import triton_kernels as kernels
from lineardit.kernels.window.triton_window import BACKWARD_TILES, FORWARD_TILES, Tiles, candidates

TABLE = Path(__file__).parent / "results" / "kernel_resources.json"
SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    120: 101_376,
}  # bytes a program may take
DEFAULT_ARCHS = (80, 86, 90)
HEAD_DIM = 128
ODD_HEAD_DIM = 72
MEASURES = ("registers", "stack_bytes", "shared_bytes", "narrow_loads")
POINTERS = {
    "*fp32": {"LSE", "GRAD_LSE", "DELTA", "SHARES"},
    "*i8": {"HIDDEN"},
    "*i64": {"MASK_WORDS", "SHARED_WORDS"},
    "*i32": {
        *("QUERY_CORNERS", "KEY_CORNERS", "MASK_IDS", "COUNTS", "INSIDE"),
        *("TILES", "CELLS", "CHOSEN", "NUM_UNMASKED", "CHOOSERS", "FIRST", "ROWS", "COLUMNS", "FRAMES"),
    },
}
FOCUS_SIDES = (4, 8)
# Programs write partial sums of the gradients, which are summed afterwards.
PARTIAL_SUMS = (kernels.window_grad_shared, focus_kernels.focus_grad_proxy)


def tile_constants(kernel: Any, tiles: Tiles) -> dict[str, int]:
    """The compile-time constants of a window kernel's tiles."""
    queries, keys = tiles.owned, tiles.read
    if kernel in (kernels.window_grad_key, kernels.window_grad_shared):  # their programs own keys
        queries, keys = keys, queries
    sides = {"Q_ROWS": queries[0], "Q_COLUMNS": queries[1], "K_ROWS": keys[0], "K_COLUMNS": keys[1]}
    return sides | {"BLOCK_Q": math.prod(queries), "BLOCK_K": math.prod(keys), "WORD_LEN": math.prod(tiles.read)}


def argument_type(kernel: Any, name: str) -> str:
    """An argument's type for Triton."""
    if name.isupper():
        if kernel in PARTIAL_SUMS and name in ("GRAD_K", "GRAD_V"):
            return "*fp32"
        return next((kind for kind, names in POINTERS.items() if name in names), "*bf16")
    return "fp32" if name == "scale" else "i32"


def compile_for(
    kernel: Any, blocks: dict[str, int], options: Tiles | Blocks, arch: int, head_dim: int = HEAD_DIM
) -> dict[str, int]:
    """Registers and bytes of stack (spills) per thread, bytes of shared memory per program, loads of 1 or 2 bytes."""
    names = kernel.arg_names
    constants = {**blocks, "HEAD_DIM": head_dim, "BLOCK_D": block_d(head_dim), "PRECISION": "ieee", "UNIT": STRIDE_UNIT}
    constexprs = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constexprs else argument_type(kernel, name) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name == "num_cells"]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    launch = {"num_warps": options.num_warps, "num_stages": options.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch)
    registers, stack = cubin_usage(compiled.asm["cubin"])
    narrow = len(re.findall(r"\bld\.global\S*\.b(?:8|16)\s", compiled.asm["ptx"]))
    return dict(zip(MEASURES, (registers, stack, compiled.metadata.shared, narrow), strict=True))


def cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack of the cubin's only kernel, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", run.stdout + run.stderr)[0]
    return int(registers), int(stack)


def rows_for(arch: int, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """One row for each kernel, with the first tiles for which all kernels of a direction fit."""
    rows = {}
    directions = {
        FORWARD_TILES: (kernels.window_forward,),
        BACKWARD_TILES: (kernels.window_grad_query, kernels.window_grad_key, kernels.window_grad_shared),
    }
    for tile_candidates, members in directions.items():
        for tiles in candidates(tile_candidates, HEAD_DIM, arch, torch.bfloat16):
            usages = {one.fn.__name__: compile_for(one, tile_constants(one, tiles), tiles, arch) for one in members}
            if all(usage["shared_bytes"] <= SHARED_MEMORY[arch] for usage in usages.values()):
                break
            report(f"sm_{arch}: {tiles} do not fit")
        for name, usage in usages.items():
            shape = f"owned {tiles.owned[0]}x{tiles.owned[1]} read {tiles.read[0]}x{tiles.read[1]}"
            rows[f"sm_{arch} {name}"] = {"tiles": f"{shape} w{tiles.num_warps} s{tiles.num_stages}", **usage}
            report(f"sm_{arch} {name:20} {rows[f'sm_{arch} {name}']}")
    tiles, forward = FORWARD_TILES[0], kernels.window_forward
    usage = compile_for(forward, tile_constants(forward, tiles), tiles, arch, ODD_HEAD_DIM)
    rows[f"sm_{arch} window_forward, head dimension {ODD_HEAD_DIM}"] = {"tiles": "the largest", **usage}
    for side in FOCUS_SIDES:
        for name, row in focus_rows(side, arch, report).items():
            rows[f"sm_{arch} {name}, {side} x {side} queries"] = row
            report(f"sm_{arch} {name}, {side} x {side} queries {row}")
    return rows


def focus_rows(side: int, arch: int, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The focus kernels, each direction with the first blocks that fit; key kernels are the same for all sides, and
    compiled once.
    """
    key_kernels = (focus_kernels.focus_grad_proxy, focus_kernels.focus_grad_cell) if side == FOCUS_SIDES[0] else ()
    directions: tuple[tuple[list[Blocks], tuple[Any, ...]], ...] = (
        (focus_candidates(side, torch.bfloat16), (focus_kernels.focus_forward,)),
        (backward_candidates(HEAD_DIM, torch.bfloat16), (focus_kernels.focus_grad_query, *key_kernels)),
    )
    rows: dict[str, dict[str, Any]] = {}
    for block_candidates, members in directions:
        for blocks in block_candidates:
            constants = {"BLOCK_Q": query_slots(side), "BLOCK_K": blocks.keys}
            constants |= {"BLOCK_ROWS": BLOCK_ROWS, "DISJOINT": True}
            for kernel in members:
                launch_blocks = blocks if kernel in key_kernels else replace(blocks, num_warps=query_warps(side))
                tiles = f"k{launch_blocks.keys} w{launch_blocks.num_warps} s{launch_blocks.num_stages}"
                rows[kernel.fn.__name__] = {"tiles": tiles, **compile_for(kernel, constants, launch_blocks, arch)}
            if all(rows[kernel.fn.__name__]["shared_bytes"] <= SHARED_MEMORY[arch] for kernel in members):
                break
            report(f"sm_{arch}: {blocks} do not fit")
    if key_kernels:  # cells of few tokens, as at 1024 x 1024 pixels with 1,024 proxies
        small_blocks = replace(blocks, keys=16, num_warps=key_warps(16))
        constants["BLOCK_K"] = small_blocks.keys
        usage = compile_for(focus_kernels.focus_grad_cell, constants, small_blocks, arch)
        rows["focus_grad_cell of small cells"] = {
            "tiles": f"k16 w{small_blocks.num_warps} s{small_blocks.num_stages}",
            **usage,
        }
    return rows


def growth(rows: dict[str, dict[str, Any]], table: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each measure that is larger than in the table, and for each change of tiles."""
    lines = [f"{name}: not in the table" for name in rows if name not in table]
    for name in rows.keys() & table.keys():
        if rows[name]["tiles"] != table[name]["tiles"]:
            lines.append(f"{name}: tiles {rows[name]['tiles']}, in the table {table[name]['tiles']}")
        lines += [
            f"{name}: {measure} {rows[name][measure]}, in the table {table[name][measure]}"
            for measure in MEASURES
            if rows[name][measure] > table[name][measure]
        ]
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", default=DEFAULT_ARCHS, choices=SHARED_MEMORY)
    parser.add_argument("--write", action="store_true", help="write the table instead of comparing with it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    rows = {name: row for arch in arguments.archs for name, row in rows_for(arch, print).items()}
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__, "kernels": {}}
    if arguments.write:
        known = stored["kernels"] if stored["triton"] == triton.__version__ else {}
        content = {"triton": triton.__version__, "kernels": dict(sorted({**known, **rows}.items()))}
        TABLE.write_text(json.dumps(content, indent=2) + "\n")
        return 0
    if stored["triton"] != triton.__version__:
        print(f"the table was made with Triton {stored['triton']}, this is {triton.__version__}: nothing compared")
        return 0
    lines = growth(rows, stored["kernels"])
    print("\n".join(lines) if lines else "nothing grew")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
