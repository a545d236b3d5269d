"""Parsing shared by several commands: sizes, lists of numbers, arguments, parts of the work, files of prompts."""

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..linearize.adapters.quantization import Quantization


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from WIDTHxHEIGHT.

    Raises:
        ValueError: not of this form, or a side of 0.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT in pixels, for example 1024x768, got {text!r}")
    return int(match[2]), int(match[1])


def parse_numbers(option: str, text: str) -> list[float]:
    """Numbers from 4,8,16.

    Raises:
        ValueError: not of this form.
    """
    try:
        return [float(part) if "." in part else int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers separated by commas, for example 4,8,16, got {text!r}") from error


def parse_arguments(texts: Sequence[str] | None) -> dict[str, Any]:
    """{name: value} from texts NAME=VALUE, the value a number, boolean, list or string as in TOML, or bare text.

    Raises:
        ValueError: not of this form, or one name twice.
    """
    arguments: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()) or name in arguments:
            raise ValueError(f"--argument must be NAME=VALUE, each name once, such as true_cfg_scale=4.0, got {text!r}")
        arguments[name] = _value(value)
    return arguments


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    plain = len(parsed) == 1 and "#" not in text and isinstance(parsed["value"], bool | int | float | str | list)
    return parsed["value"] if plain else text  # dates, comments and second lines stay text


def split_outside_brackets(text: str) -> list[str]:
    """Split at commas outside brackets; an empty text has no parts."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts if text else []


def parse_quantization(text: str | None) -> "Quantization | None":
    """What `--quantize BACKEND[:NAME=VALUE,...]` asks for; values as in `parse_arguments`.

    Raises:
        ValueError: not of this form, or no such backend.
    """
    if text is None:
        return None
    from ..linearize.adapters.quantization import Quantization

    backend, colon, settings = text.partition(":")
    pairs = [one.partition("=") for one in split_outside_brackets(settings)] if colon else []
    arguments = {name: _value(value) for name, _, value in pairs}
    lists = [name for name, value in arguments.items() if isinstance(value, str) and value.startswith(("[", "{"))]
    if (colon and not settings) or lists or len(arguments) < len(pairs) or not all(one[0] and one[1] for one in pairs):
        raise ValueError(
            "--quantize must be BACKEND[:NAME=VALUE,...], each name once, such as "
            "bitsandbytes_4bit:bnb_4bit_use_double_quant=true, and a list as in TOML, such as "
            f"""torchao:modules_to_not_convert=["proj_out","norm_out"], got {text!r}"""
        )
    return Quantization(quant_backend=backend, quant_kwargs=arguments)


def parse_part(text: str | None) -> tuple[int, int]:
    """(i, n) from "I/N", or (1, 1) without a text; under a launcher, this process's share of that part.

    Raises:
        ValueError: not of this form.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    rank = int(os.environ.get("RANK") or 0) if processes > 1 else 0
    if text is None:
        return rank + 1, processes
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"--part must be I/N with I from 1 to N, such as 2/8, got {text!r}")
    part, parts = int(found[1]), int(found[2])
    return part + parts * rank, parts * processes  # every `processes`-th item of this part


def read_prompts(file: Path) -> list[str]:
    """Read one prompt per line; empty lines, lines that start with # and a byte order mark are skipped.

    Raises:
        ValueError: the file holds no prompt.
        OSError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be text in UTF-8 ({error})") from error
    prompts = [line.strip() for line in text.split("\n")]  # `splitlines` also splits at other characters
    prompts = [prompt for prompt in prompts if prompt and not prompt.startswith("#")]
    if not prompts:
        raise ValueError(f"{file} must have one prompt per line, but has none; lines that begin with # are comments")
    return prompts
