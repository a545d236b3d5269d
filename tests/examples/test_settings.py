"""The settings that people copy are settings that distillation takes."""

from pathlib import Path

import pytest

from lineardit import Clear, Hybrid, ProxyTokens
from lineardit.distill.config_tables import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.toml")), ids=lambda file: file.name)
def test_load_config_takes_the_example(file):
    assert load_config(file).run.steps > 0


def test_load_config_takes_the_hybrid_of_the_comments(tmp_path):
    lines = (EXAMPLES / "distill_flux.toml").read_text().splitlines()
    kept = [line for line in lines if line not in ('method = "clear"', "radius = 16")]
    settings = [line.removeprefix("#   ") if " = " in line else line for line in kept]
    (tmp_path / "hybrid.toml").write_text("\n".join(settings))
    method = load_config(tmp_path / "hybrid.toml").method
    proxies = ProxyTokens(num_proxies=1024)
    assert method == Hybrid(local=Clear(radius=16), global_=proxies, gate=1.0, focus_tokens=1024)
