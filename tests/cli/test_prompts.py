from pathlib import Path

import pytest

from lineardit.commands.prompts import parse_arguments, parse_size, read_prompts


def test_parse_size_takes_width_first() -> None:
    assert parse_size("8192x4096") == (4096, 8192)


@pytest.mark.parametrize("text", ["512", "512x", "x512", "512X512", "0x512", "-1x512", "512x512x3", "51.2x512", ""])
def test_parse_size_error_names_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="WIDTHxHEIGHT"):
        parse_size(text)


def test_parse_arguments_takes_toml_or_bare_text() -> None:
    texts = ["true_cfg_scale=4.0", "negative_prompt=blurry, dark", 'clip_skip="2"', "guidance_schedule=[1, 2]"]
    assert parse_arguments(texts) == {
        "true_cfg_scale": 4.0,
        "negative_prompt": "blurry, dark",
        "clip_skip": "2",
        "guidance_schedule": [1, 2],
    }
    assert parse_arguments(None) == {}
    for text in ("2024-01-01", "5 # blue", "0\nfoo=7", "{a = 1}"):
        assert parse_arguments([f"negative_prompt={text}"]) == {"negative_prompt": text}


@pytest.mark.parametrize("texts", [["cfg"], ["=3"], ["two words=3"], ["a=1", "a=2"]])
def test_parse_arguments_error_names_the_form(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="--argument must be NAME=VALUE, each name once"):
        parse_arguments(texts)


def test_read_prompts_skips_empty_lines_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na red circle\n\n  ein grünes Dreieck  \n", encoding="utf-8")
    assert read_prompts(file) == ["a red circle", "ein grünes Dreieck"]


def test_read_prompts_accepts_files_of_any_editor(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("# Windows\r\na red\u2028circle\r\n".encode("utf-8-sig"))
    assert read_prompts(file) == ["a red\u2028circle"]


def test_read_prompts_refuses_invalid_utf8(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"prompts.txt must be text in UTF-8"):
        read_prompts(tmp_path / "prompts.txt")


def test_read_prompts_refuses_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="one prompt per line"):
        read_prompts(tmp_path / "prompts.txt")
