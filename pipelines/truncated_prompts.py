"""Warns about prompts that are longer than a pipeline's text encoders read.

diffusers truncates them; some of its pipelines do not say so, and FLUX's and SD3's name other words than T5 loses.
"""

import logging
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..linearize.calling import default_settings

logger = logging.getLogger(__name__)


def warn_truncated_prompts(pipe: Any, prompts: Sequence[str], max_sequence_length: int | None) -> None:
    """Warn once per prompt about the words that are cut; if there are text encoders besides CLIP, those they lose.

    Templates that a pipeline adds to a prompt (Qwen-Image and others) are not counted.

    Args:
        max_sequence_length: Text tokens; None: the pipeline's default.
    """
    tokenizers = {name: part for name, part in pipe.components.items() if isinstance(part, PreTrainedTokenizerBase)}
    others = [one for name, one in tokenizers.items() if not _is_clip(pipe, name)]
    if not tokenizers:
        return
    tokenizer = max(others or tokenizers.values(), key=lambda one: one.model_max_length)
    limit, why = tokenizer.model_max_length, "the limit of its text encoder"
    requested = max_sequence_length or default_settings(pipe).max_sequence_length
    if others and requested is not None:
        limit, why = requested, "set by --max-sequence-length"
    for prompt in dict.fromkeys(prompts):
        tokens = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        num_read = limit - tokenizer.num_special_tokens_to_add()
        if len(tokens) > num_read:
            _warn(prompt, tokenizer.decode(tokens[num_read:]), limit, why)


def _is_clip(pipe: Any, tokenizer: str) -> bool:
    """Whether the tokenizer is for CLIP, whose 77 tokens no setting changes."""
    return "CLIP" in type(getattr(pipe, tokenizer.replace("tokenizer", "text_encoder"), None)).__name__


def _warn(prompt: str, cut: str, limit: int, why: str) -> None:
    message = "the prompt '%s' is truncated to %d tokens (%s), losing '%s'"
    logger.warning(message, shorten(prompt, 40, placeholder="..."), limit, why, shorten(cut, 200, placeholder="..."))
