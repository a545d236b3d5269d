"""The whole run: each part in its own process, a smoke run in one process; then tables and marks.

Rows already in the file for the same GPU, commit and versions are not measured again.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .compile_ahead import compile_ahead
from .environment import ROOT, describe, file_name
from .marks import marks
from .records import PARTS, SETTLED, STATUSES, Results, Row, load, open_results
from .tables import failures, marks_table, part_tables

PART_SECONDS = 165
SMOKE_SECONDS = 3600  # a smoke run is not cut short
GRACE = 45  # seconds past a part's time at which its last row is given up
STDERR_LINES = 30  # of a process's stderr, the last ones


def run_parts(path: Path, parts: Sequence[str], seconds: float, *, compile_first: bool = False) -> Results:
    """Run parts in one process; if a row ends it, record that in the file and continue in a new one.

    Args:
        compile_first: Compile kernels before, on all cores.
    """
    deadline = time.monotonic() + seconds
    if compile_first:
        compile_ahead(path, deadline)
    while True:
        command = [sys.executable, "-m", f"{__package__}.worker", str(path), f"{deadline:.0f}", *parts]
        code, stderr = run_process(command, max(deadline - time.monotonic(), 0) + GRACE)
        results = load(path)
        # if all goes well, stderr holds warnings about kernels that fell back
        if stderr.strip():
            print("\n".join(stderr.splitlines()[-STDERR_LINES:]), file=sys.stderr, flush=True)
        if code == 0:
            return results
        row_was_running = results.running is not None
        results.add(failed_row(results, parts[0], code, stderr))
        if not row_was_running:
            return results


def run_process(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code, None if it was ended after `limit` seconds; and its stderr.

    stderr goes to a file: processes left behind would keep a pipe open.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as stderr:
        try:
            code = subprocess.run(command, cwd=ROOT, stderr=stderr, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = None
        stderr.seek(0)
        return code, stderr.read()


def failed_row(results: Results, part: str, code: int | None, stderr: str) -> Row:
    """The row that was running when the process ended, or the start of this part."""
    lines = stderr.strip().splitlines() or ["it said nothing"]
    error = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)] or lines
    note = f"process ended with {code}: {error[-1][:500]}"
    if code is None:
        note = f"given up {GRACE} s after the time of its part"
    part, case, impl = results.running or (part, "start", "worker")
    return Row(part=part, case=case, impl=impl, status="failed", took=0, note=note)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="everything at tiny sizes, on the CPU")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    parser.add_argument("--again", action="store_true", help="measure these parts anew")
    parser.add_argument(
        "--seconds",
        type=int,
        default=PART_SECONDS,
        help="of each part, after which no new row begins (default: %(default)s; 120 leave all parts ten minutes)",
    )
    parser.add_argument("--impl", default="triton", help="our implementation (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="of the JSON (default: benchmarks/results; smoke: a new one)")
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse(sys.argv[1:])
    head = describe(smoke=arguments.smoke, impl=arguments.impl, arguments=sys.argv[1:])
    folder = arguments.output or (Path(tempfile.mkdtemp()) if arguments.smoke else ROOT / "benchmarks/results")
    path = folder.resolve() / file_name(head)
    results = open_results(path, head)
    parts = arguments.only or PARTS
    results.forget(parts, statuses=STATUSES if arguments.again else set(STATUSES) - set(SETTLED))
    print(f"{head.gpu}, {head.date}, commit {head.commit}, {head.versions}\n{path}", flush=True)
    # A process for each part frees the GPU's memory; loading torch four times takes too long for a smoke run.
    groups = [parts] if arguments.smoke else [[part] for part in parts]
    for group in groups:
        compile_first = group == ["correctness"] and not arguments.smoke and head.impl == "triton"
        results = run_parts(
            path, group, SMOKE_SECONDS if arguments.smoke else arguments.seconds, compile_first=compile_first
        )
        results.marks = marks(results)  # after each: the next may be cut off
        results.save()
    for part in parts:
        print(f"\n{part_tables(results, part)}")
    print(f"\n{marks_table(results.marks)}\n\n{path}")
    missing = [row for row in results.rows if row.part in parts and row.status not in SETTLED]
    failed = [row for row in missing if row.status == "failed"]
    if len(missing) > len(failed):
        print(f"{len(missing) - len(failed)} rows were left out for time: the same command goes on with them")
    if failed:
        print(failures(failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
