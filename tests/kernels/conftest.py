"""A fix to the Triton interpreter for tests."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def bf16_in_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fix `tl.dot` of bfloat16, which Triton's interpreter silently treats as uint16."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *arguments: Any) -> Any:
        return dot(self, widened(a), widened(b), *arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    yield
