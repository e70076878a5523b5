"""From measured numbers to lines: passed, failed with a reason, or not applicable; the table and the JSON of them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from acceptance.registry import Check
from acceptance.world import Measured

STATUSES = PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "n/a"
Limits = dict[str, dict[str, float]]  # number -> {"max": ...} or {"min": ...}


@dataclass
class Line:
    """A check's line of the table. values: a number with a limit is the worst of all ranks', others are rank 0's."""

    check: str
    passes: str
    status: str
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)
    thresholds: Limits = field(default_factory=dict)


def limits_of(thresholds: dict, check: str, *, cuda: bool) -> Limits:
    """Return the limits of a check that hold on this device. thresholds: of thresholds.yaml, where a number may have limits
    for cuda and cpu apart, or for one of them alone."""
    found, device = {}, "cuda" if cuda else "cpu"
    for name, limit in thresholds[check].items():
        limit = limit.get(device) if limit.keys() <= {"cuda", "cpu"} else limit
        if limit:
            found[name] = limit
    return found


def judge(check: Check, measured: Measured, limits: Limits) -> Line:
    """Make the line of a check that ran. A value named `because`, a text, is added to the reason of a failure."""
    line = Line(check.name, check.passes, PASS, seconds=round(measured.seconds, 1), thresholds=limits)
    if measured.error:
        line.status, line.reason = FAIL, measured.error
        return line
    for each in reversed(measured.values):
        line.values |= each
    problems = []
    for name, limit in limits.items():
        value = line.values[name] = _worst(measured.values, name, limit)
        if not _within(value, limit):
            problems.append(f"{name} is {_shown(value)} and should be {_wanted(limit)}")
    if problems:
        line.status, line.reason = FAIL, "; ".join([*problems, *filter(None, [line.values.get("because")])])
    return line


def not_applicable(check: Check, reason: str) -> Line:
    """Make the line of a check that was not run."""
    return Line(check.name, check.passes, NOT_APPLICABLE, reason)


def table(lines: list[Line]) -> str:
    """Lay the lines out as plain text. One that passed shows its numbers with their limits."""
    rows = [("check", "result", "seconds", "")]
    for line in lines:
        numbers = ", ".join(f"{n} {_shown(line.values[n])} ({_wanted(limit)})" for n, limit in _known(line))
        seconds = "" if line.status == NOT_APPLICABLE else f"{line.seconds:.1f}"
        rows.append((line.check, line.status, seconds, line.reason or numbers))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{a:<{width}}  {b:<6}  {c:>7}  {d}".rstrip() for a, b, c, d in rows)


def write_json(path: Path, lines: list[Line], facts: dict[str, Any], seconds: float) -> None:
    """Write the machine, the versions, and what was measured and accepted in every line. NaN becomes null."""
    record = {**facts, "seconds": round(seconds, 1), "checks": [asdict(line) for line in lines]}
    path.write_text(json.dumps(_finite(record), indent=1) + "\n")


def _known(line: Line) -> list[tuple[str, dict[str, float]]]:
    return [(name, limit) for name, limit in line.thresholds.items() if name in line.values]


def _worst(values: list[dict[str, Any]], name: str, limit: dict[str, float]) -> float | None:
    """Return the worst value of all ranks that measured `name`; None if nobody did."""
    numbers = [each[name] for each in values if name in each]
    if any(math.isnan(number) for number in numbers):
        return math.nan
    return (min if "min" in limit else max)(numbers, default=None)


def _within(value: float | None, limit: dict[str, float]) -> bool:
    """Compare; NaN and unmeasured values are never within."""
    return value is not None and limit.get("min", -math.inf) <= value <= limit.get("max", math.inf)


def _wanted(limit: dict[str, float]) -> str:
    words = {"min": "at least", "max": "at most"}
    return " and ".join(f"{words[bound]} {value:g}" for bound, value in limit.items())


def _shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
