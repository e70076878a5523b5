"""Seconds and memory for a million rows of JSON lines: our reader, and `datasets` as it reads a file for the first time.

python benchmarks/read_rows.py [--rows 1000000] [--repetitions 3]

Each reading is a process of its own, and the two take turns. Peak memory is above that of the process before it reads.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

QUESTION = "how many pencils does each of the twelve boxes hold if half as many were sold in May as in April"


def write_rows(path: Path, count: int) -> None:
    draw, words = random.Random(0), QUESTION.split()
    with path.open("w") as file:
        for number in range(count):
            question = " ".join(draw.choices(words, k=40))
            row = {"prompt": f"{question} ({number})?", "answer": str(number), "task": "math", "level": number % 5}
            file.write(json.dumps(row) + "\n")


def with_ours(path: Path) -> Iterable[dict]:
    from frpo_nemo.config.options import SourceConfig
    from frpo_nemo.data.sources import load_rows

    return load_rows(SourceConfig(path=str(path)))


def with_datasets(path: Path) -> Iterable[dict]:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset("json", data_files=str(path), split="train").to_list()


READERS: dict[str, Callable[[Path], Iterable[dict]]] = {"ours": with_ours, "datasets": with_datasets}


def measure(reader: str, path: Path) -> None:
    """Print one reading: seconds until the rows are there, seconds to go through them, and the peak in bytes."""
    READERS[reader](path.with_name("few.jsonl"))  # imports
    before, start = peak_bytes(), time.perf_counter()
    rows = READERS[reader](path)
    read = time.perf_counter()
    count = sum(len(row) > 0 for row in rows)
    print(json.dumps([count, read - start, time.perf_counter() - read, peak_bytes() - before]))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(reader: str, path: Path) -> list[float]:
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        command = [sys.executable, __file__, "--reader", reader, "--path", str(path)]
        environment = os.environ | {"HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.reader:
        return measure(given.reader, given.path)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.jsonl"
        write_rows(path, given.rows)
        write_rows(path.with_name("few.jsonl"), 10)
        size = path.stat().st_size
        print(f"{given.rows:,} rows, {size / 2**20:,.0f} MiB")
        results: dict[str, list[list[float]]] = {name: [] for name in READERS}
        for _ in range(given.repetitions):
            for name in READERS:
                results[name].append(run(name, path))
        for name, readings in results.items():
            assert all(reading[0] == given.rows for reading in readings)
            read, through, peak = (statistics.median(column) for column in list(zip(*readings, strict=True))[1:])
            print(f"{name:9} read {read:.2f} s, go through {through:.2f} s, peak {peak / size:.2f} x the file")


if __name__ == "__main__":
    main()
