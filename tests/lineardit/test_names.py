"""The package for a newcomer: tab completion, help, and misspelled names."""

import pydoc
import subprocess
import sys

import lineardit


def test_completion_offers_only_public_names_and_loaded_packages() -> None:
    lineardit.linearize_  # noqa: B018  loads its package
    offered = {name for name in dir(lineardit) if not name.startswith("__")}
    assert set(lineardit.__all__) <= offered
    assert "linearize" in offered
    assert not offered & {"Any", "Path", "TYPE_CHECKING", "ModuleType", "import_module", "sys", "_root"}


def test_misspelled_name_gets_a_suggestion() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import lineardit; lineardit.linearise_"], capture_output=True, text=True, check=False
    )
    assert "module 'lineardit' has no attribute 'linearise_'. Did you mean: 'linearize_'?" in result.stderr


def test_help_begins_with_the_call_to_type() -> None:
    assert "lineardit.linearize_(pipe)" in pydoc.render_doc(lineardit, renderer=pydoc.plaintext)[:2000]
