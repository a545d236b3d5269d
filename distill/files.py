"""Atomic writes of JSON files."""

import json
from pathlib import Path
from typing import Any

from ..linearize.folders import write_atomically


def write_json(path: Path, content: Any) -> None:
    """Write `content`, indented by one."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))
