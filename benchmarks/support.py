"""Runs the tests of each model family and writes the table of docs/models.md (`make support`).

A cell is "yes" if every case of the test with this family ran and passed, "-" if there is no such test for it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- support: written by `make support` -->", "<!-- end of support -->"
FILES = ("tests/linearize/test_seam.py", "tests/linearize/test_adapter.py")
FEATURES = {
    "exact window": "test_linearize_receptive_field_is_the_window",
    "full window = original": "test_linearize_covering_window_is_bit_equal",
    "restored": "test_restore_gives_the_base_bit_for_bit",
    "new size": "test_linearize_follows_the_resolution",
    "adapter": "test_load_adapter_round_trips_every_family",
    "checkpointing": "test_gradient_checkpointing_gives_the_same_gradients",
    "copied, pickled": "test_deepcopy_and_pickle_are_models_of_their_own",
}

Outcomes = dict[tuple[str, str], list[bool]]  # (test function, family) -> whether each case passed


def family_of_case(parameters: str, families: list[str]) -> str | None:
    """The longest family name that the parameters of a case, "flux-controlnet-tiled", begin with."""
    found = [name for name in families if parameters == name or parameters.startswith(f"{name}-")]
    return max(found, key=len, default=None)


def outcomes(report: Path, families: list[str]) -> Outcomes:
    """What pytest's JUnit report says, by test function and family."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        match = re.fullmatch(r"(\w+)\[(.+)\]", case.get("name", ""))
        family = family_of_case(match[2], families) if match else None
        if match and family and case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            found.setdefault((match[1], family), []).append(passed)
    return found


def as_markdown(models: dict[str, str], found: Outcomes) -> str:
    """The table; `models`: family -> class."""
    lines = ["| model | " + " | ".join(FEATURES) + " |", "| --- |" + " --- |" * len(FEATURES)]
    for family, cls in models.items():
        cells = [_cell(found.get((test, family), [])) for test in FEATURES.values()]
        lines.append(f"| `{cls}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(passed: list[bool]) -> str:
    if not passed:
        return "-"
    return "yes" if all(passed) else "**no**"


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from tiny_models import FAMILIES, MODELS

    models = {family: MODELS[family].needs for family in FAMILIES}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        names = " or ".join(FEATURES.values())
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "", "-k", names, f"--junitxml={report}"]
        code = subprocess.run([*command, *FILES], cwd=ROOT).returncode
        if code not in (0, 1):  # 1: some failed, the table says which
            raise SystemExit("pytest did not run to its end, so the table stays as it was")
        table = as_markdown(models, outcomes(report, list(models)))
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    main()
