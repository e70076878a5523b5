"""One page about runs that exist already: reward under later fine-tuning, arm against arm.

    python recipes/report.py runs/forgetting                                   # a study: its results.jsonl
    python recipes/report.py runs/gsm8k/frpo runs/gsm8k/grpo --out runs/gsm8k/report

A run of recipes/frpo.py with validations is a stage one; a run with probes is a fine-tuning of the run whose export it
began from, which is found automatically. Only files in run directories are read.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from frpo_nemo.errors import ConfigError
from frpo_nemo.report.page import print_summary, write_report
from frpo_nemo.report.runs import rows_of_runs
from frpo_nemo.study.results import ResultRow, read_results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN_DIR", help="or a results.jsonl, or its directory")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the page and its pictures (default: the study's, or report next to the runs)",
    )
    arguments = parser.parse_args()
    try:
        rows = read(arguments.paths)
        page = write_report(rows, arguments.out or default_out(arguments.paths))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print_summary(rows)
    print(f"\nreport: {page}")


def read(paths: list[Path]) -> list[ResultRow]:
    """Return the rows of all studies and runs among `paths`."""
    studies = [path / "results.jsonl" if path.is_dir() else path for path in paths if is_study(path)]
    runs = [path for path in paths if not is_study(path)]
    return [row for study in studies for row in read_results(study)] + rows_of_runs(runs)


def is_study(path: Path) -> bool:
    return path.suffix == ".jsonl" or (path / "results.jsonl").exists()


def default_out(paths: list[Path]) -> Path:
    """Return the directory of the only study, or report next to the runs."""
    if len(paths) == 1 and is_study(paths[0]):
        return paths[0] if paths[0].is_dir() else paths[0].parent
    return Path(os.path.commonpath([path.resolve().parent for path in paths])) / "report"


if __name__ == "__main__":
    main()
