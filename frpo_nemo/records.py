"""Small files that a run keeps: written whole, and read though the process that wrote them was killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Return the objects of a file with one on each line. A last line without its end was cut off, or is being written, and
    is left out. Raises OSError, and ValueError for any other line that isn't JSON."""
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def write_whole(path: Path, text: str) -> None:
    """Make `text` the content of a file: readers see all of it, or what was there before."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
