"""Wrong rewards of `math` on completions whose reward is known by construction (math_cases.py), by kind of completion.

    python benchmarks/math_grading.py --data ../shared/data [--limit N] [--write cases.jsonl]

--data: a directory with math500/test.jsonl and gsm8k/test.jsonl; each gold answer is taken once. --write: the cases as JSON
lines too, for math_other_graders.py, which other graders run in an environment of their own."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.math_cases import DEBATABLE, Case, cases  # noqa: E402
from frpo_nemo.rewards.math_answers.grade import math_answer  # noqa: E402


@dataclass(frozen=True)
class Row:
    """A case of a gold answer. column: what the data set's column holds."""

    data: str
    gold: str
    column: str
    case: Case


def rows(directory: Path, limit: int | None) -> Iterator[Row]:
    """Return the cases of every gold answer, or of about `limit` in all, spread over both sets."""
    for data in ("math500", "gsm8k"):
        lines = (directory / data / "test.jsonl").read_text().splitlines()
        columns = {}
        for line in lines:
            column = json.loads(line)["answer"]
            columns.setdefault(column.rpartition("####")[2].strip(), column)
        golds = list(columns)[:: max(1, 2 * len(columns) // limit) if limit else 1]
        for gold in golds:
            yield from (Row(data, gold, columns[gold], case) for case in cases(gold, after_hashes=data == "gsm8k"))


def kind_of_row(row: Row) -> str:
    """rewritings, near misses, or debatable."""
    return "debatable" if row.case.kind in DEBATABLE else "rewritings" if row.case.reward else "near misses"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    wrong, count, kinds, slowest, seconds = Counter(), Counter(), Counter(), 0.0, 0.0
    found = list(rows(args.data, args.limit))
    for row in found:
        start = time.perf_counter()
        (reward,) = math_answer(None, [row.case.completion], answer=[row.column])
        elapsed = time.perf_counter() - start
        slowest, seconds = max(slowest, elapsed), seconds + elapsed
        group = row.data, kind_of_row(row)
        count[group] += 1
        wrong[group] += reward != row.case.reward
        kinds[row.case.kind] += reward != row.case.reward
    for group, number in sorted(count.items()):
        print(f"{' '.join(group):22} {number:6} cases, {100 * wrong[group] / number:5.2f}% wrong")
    print(f"{len(found)} calls, {seconds:.1f} s, the slowest {slowest:.2f} s")
    for kind, number in kinds.most_common():
        if number:
            print(f"  {kind}: {number}")
    if args.write:
        args.write.write_text(
            "".join(
                json.dumps({"data": r.data, "gold": r.gold, "group": kind_of_row(r), **asdict(r.case)}) + "\n"
                for r in found
            )
        )


if __name__ == "__main__":
    main()
