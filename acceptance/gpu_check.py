"""Accept a machine with GPUs: run every check on it, print one table, write one JSON.

    python acceptance/gpu_check.py               # one GPU, at most ten minutes
    python acceptance/gpu_check.py --gpus 8      # what needs more of them, too
    python acceptance/gpu_check.py --cpu         # a rehearsal without a GPU, on tiny models
    python acceptance/gpu_check.py --only mfu resume

Exit code 0 if nothing failed, 1 if something did, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started by its path

from acceptance import registry, report, world
from acceptance.registry import Check, Group
from acceptance.report import Line
from acceptance.world import ROOT

CPU_RANKS = 2  # processes that stand in for GPUs
CPU_PATIENCE = 4  # factor on a group's limit, which is for an otherwise idle GPU


def main() -> int:
    options = _options()
    started, facts = time.monotonic(), _facts(options)
    options.out.mkdir(parents=True, exist_ok=True)
    thresholds = yaml.safe_load(options.thresholds.read_text())
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        (Path(work) / "models").mkdir()
        lines = _run(options, facts, thresholds, Path(work))
    text = report.table(lines)
    print(text, flush=True)
    (options.out / "table.txt").write_text(text + "\n")
    file = options.out / "result.json"
    report.write_json(file, lines, facts, time.monotonic() - started)
    counts = ", ".join(f"{sum(line.status == status for line in lines)} {status}" for status in report.STATUSES)
    print(f"{facts['device']}: {counts}, {time.monotonic() - started:.0f} s. Details: {file}", flush=True)
    return int(any(line.status == report.FAIL for line in lines))


def _run(options: argparse.Namespace, facts: dict, thresholds: dict, work: Path) -> list[Line]:
    """Run all groups: on a GPU one after the other, on a CPU with CPU_RANKS processes at once."""
    lines: dict[str, Line] = {}

    def run_group(group: Group) -> None:
        to_run = []
        for check in _chosen(group, options.only):
            reason = registry.not_applicable(group, check, facts)
            if reason:
                lines[check.name] = report.not_applicable(check, reason)
            else:
                to_run.append(check)
        if to_run:
            _say(f"{group.name} ...")
            group = replace(group, seconds=group.seconds * (CPU_PATIENCE if options.cpu else 1))
            for name, measured in world.run_group(group, to_run, cpu=options.cpu, work=work, out=options.out).items():
                limits = report.limits_of(thresholds, name, cuda=facts["cuda"])
                lines[name] = report.judge(registry.by_name()[name], measured, limits)

    for ranks, groups in itertools.groupby(registry.GROUPS, key=lambda group: group.ranks):
        at_once = CPU_RANKS // ranks if options.cpu else 1
        if at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(run_group, groups))
        else:
            list(map(run_group, groups))
    return [lines[name] for name in registry.by_name() if name in lines]


def _chosen(group: Group, only: list[str]) -> list[Check]:
    return [check for check in group.checks if not only or check.name in only]


def _facts(options: argparse.Namespace) -> dict:
    """Return the facts of this machine and how many ranks may run at once. Ends the program without enough GPUs."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if options.cpu else {})
    command = [sys.executable, "-m", "acceptance.facts"]
    asked = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if asked.returncode:
        _say(f"python -m acceptance.facts ended with exit code {asked.returncode}, as shown above")
        sys.exit(2)
    facts = json.loads(asked.stdout.splitlines()[-1])
    if not options.cpu and facts["gpus"] < options.gpus:
        _say(f"--gpus {options.gpus}, but this machine has {facts['gpus']} CUDA devices (--cpu: a rehearsal without)")
        sys.exit(2)
    return facts | {"ranks": CPU_RANKS if options.cpu else options.gpus}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1, help="how many may be used")
    parser.add_argument("--cpu", action="store_true", help="use none")
    parser.add_argument("--only", nargs="+", default=[], choices=registry.by_name(), metavar="CHECK")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="result.json, table.txt, logs")
    parser.add_argument("--thresholds", type=Path, default=Path(__file__).with_name("thresholds.yaml"))
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
