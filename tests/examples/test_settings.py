"""Distillation accepts the example settings that people copy."""

from pathlib import Path

import pytest

from lineardit import Clear, Hybrid, ProxyTokens
from lineardit.distill.config_tables import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.toml")), ids=lambda file: file.name)
def test_load_config_accepts_the_example(file):
    assert load_config(file).run.steps > 0


def test_load_config_accepts_the_window_in_the_comments(tmp_path):
    text = (EXAMPLES / "distill_flux.toml").read_text()
    proxies = ProxyTokens(num_proxies=1024)
    hybrid = Hybrid(local=Clear(radius=16), global_=proxies, gate=1.0, focus_tokens=1024)
    assert load_config(EXAMPLES / "distill_flux.toml").method == hybrid
    before, _, after = text.partition('method = "hybrid"')
    settings = [
        line.removeprefix("#   ") if line.startswith("#   ") else "" for line in after.partition("\n[")[0].split("\n")
    ]
    (tmp_path / "window.toml").write_text("\n".join([before, *settings]) + "\n[" + after.partition("\n[")[2])
    assert load_config(tmp_path / "window.toml").method == Clear(radius=16)
