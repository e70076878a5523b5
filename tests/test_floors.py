"""Imports go downwards only, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "frpo_nemo"
# From the ground up. Those of one floor do not know each other.
FLOORS = (
    {"redact", "__version__"},
    {"errors"},
    {"stack", "records"},
    {"processes"},
    {"config"},
    {"objective", "data"},
    {"rewards", "megatron", "integrations"},
    {"rollout"},
    {"planning"},
    {"training"},
    {"conversion"},
    {"evaluation"},
    {"study"},
    {"report"},
    {"examples"},
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imported(file: Path) -> Iterator[str]:
    """Return the rooms of frpo_nemo that `file` imports from, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "frpo_nemo":
            names = [node.module] if "." in node.module else [f"frpo_nemo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("frpo_nemo.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_imports_from_lower_floors_alone(file):
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    upwards = {other for other in imported(file) if other != room and FLOOR[other] >= FLOOR[room]}
    assert not upwards, f"{room} is on floor {FLOOR[room]}"
