"""The table of docs/models.md, and the tests it is made from."""

import ast
from pathlib import Path

from benchmarks import support
from tiny_models import FAMILIES, MODELS

REPORT = """<testsuites><testsuite>
<testcase name="test_load_adapter_round_trips_every_family[flux2]"/>
<testcase name="test_linearize_receptive_field_is_the_window[flux-tiled]"/>
<testcase name="test_linearize_receptive_field_is_the_window[flux-auto]"><failure/></testcase>
<testcase name="test_linearize_receptive_field_is_the_window[flux-controlnet-auto]"/>
<testcase name="test_restore_gives_the_base_bit_for_bit[flux]"><skipped/></testcase>
</testsuite></testsuites>"""


def test_outcomes_and_table_say_what_ran_and_passed(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    families = ["flux", "flux2", "flux-controlnet"]
    outcomes = support.outcomes(tmp_path / "report.xml", families)
    assert outcomes == {
        ("test_load_adapter_round_trips_every_family", "flux2"): [True],
        ("test_linearize_receptive_field_is_the_window", "flux"): [True, False],
        ("test_linearize_receptive_field_is_the_window", "flux-controlnet"): [True],
    }
    rows = support.as_markdown({name: name.title() for name in families}, outcomes).splitlines()[2:]
    assert [row.count(" yes ") for row in rows] == [0, 1, 1]
    assert [row.count("**no**") for row in rows] == [1, 0, 0]


def test_features_name_tests_that_exist() -> None:
    functions = {
        node.name
        for file in support.FILES
        for node in ast.parse((support.ROOT / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(support.FEATURES.values()) <= functions


def test_table_has_every_model_and_no_failure() -> None:
    table = support.PAGE.read_text().split(support.BEGIN)[1].split(support.END)[0]
    header, _, *rows = table.strip().splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", *support.FEATURES]
    assert [row.split("`")[1] for row in rows] == [MODELS[family].needs for family in FAMILIES]
    assert "**no**" not in table
    for row in rows:
        cells = dict(zip(support.FEATURES, [cell.strip() for cell in row.strip("|").split("|")][1:], strict=True))
        assert {feature for feature, cell in cells.items() if cell == "-"} <= {"checkpointing"}, row
