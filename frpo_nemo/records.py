"""Write small files of a run whole, and read them even if the process that wrote them was killed."""

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
    """Replace the content of a file by `text`: readers see all of it, or the old content."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
