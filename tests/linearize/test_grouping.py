"""Glob patterns that match exactly the given modules."""

from fnmatch import fnmatchcase

from hypothesis import given
from hypothesis import strategies as st

from lineardit.linearize.adapters.grouping import grouped

NAMES = [f"{kind}.{index}.attn{part}" for kind in ("blocks", "single") for index in range(12) for part in ("", "2")]


def test_grouped_joins_the_layers_of_one_label() -> None:
    labels = dict.fromkeys(NAMES, "same")
    assert set(grouped(labels, NAMES)) == {"blocks.*.attn", "blocks.*.attn2", "single.*.attn", "single.*.attn2"}


def test_grouped_names_layers_one_by_one_where_a_glob_would_match_others() -> None:
    labels = {"blocks.1.attn": 0, "blocks.2.attn": 0}
    assert set(grouped(labels, NAMES)) == set(labels)


@given(st.dictionaries(st.sampled_from(NAMES), st.integers(0, 2)))
def test_grouped_globs_match_each_labelled_name_once_and_no_other(labels: dict[str, int]) -> None:
    globs = grouped(labels, NAMES)
    for name in NAMES:
        matching = [glob for glob in globs if fnmatchcase(name, glob)]
        assert len(matching) == (name in labels)
        assert all(name in globs[glob] for glob in matching)
    assert all(len({labels[name] for name in names}) == 1 for names in globs.values())
