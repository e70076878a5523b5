"""Runs benchmarks one after the other, each in its own process, and reads their tools' results as flat numbers."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_commands import command_line, environment, settings, tool_version
from frpo_nemo.evaluation.benchmarks import BENCHMARKS
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.records import write_whole

_LAST_LINES = 15  # lines of the log that are shown for a benchmark that failed
PROBE = "probe"  # the directory of the reward probe's result, next to those of benchmarks
LOG = "benchmark.log"  # marks a directory as this module's, which may be emptied when a benchmark starts again


def run_benchmarks(cfg: EvaluateRun, model: Path) -> bool:
    """Run those of cfg.benchmarks that have no result in cfg.out yet, one after the other, and print a table.

    Each leaves its files, benchmark.log and result.json in cfg.out/NAME; cfg.out/results.json has all scores, "NAME/score".
    A failed one is reported with the last lines of its log, and the others go on. Returns whether all have a result.
    `check_benchmarks` must have accepted cfg, and `check_model` returned model for it.
    """
    console, failed = Console(soft_wrap=True, highlight=False, markup=False), []
    for name in cfg.benchmarks:
        directory = Path(cfg.out) / name
        if finished_scores(cfg, name, model) is not None:
            console.print(f"{name}: finished before, {directory / 'result.json'}")
            continue
        console.print(f"{name}: {tool_version(BENCHMARKS[name].tool)}, log in {directory / LOG}")
        if problem := run_benchmark(cfg, name, model):
            failed.append(name)
            console.print(f"{name} failed: {problem}", style="red")
        write_summary(cfg.out)
    console.print(_table(cfg, model, failed))
    return not failed


def run_benchmark(cfg: EvaluateRun, name: str, model: Path) -> str | None:
    """Run one benchmark in an empty cfg.out/name. Returns an error message, or None when its result.json is written."""
    directory, started = Path(cfg.out) / name, time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)  # evalplus would continue with the samples of another model
    directory.mkdir(parents=True)
    log = directory / LOG
    with log.open("w") as file, _short_path(model) as short:
        command = command_line(cfg, name, short if BENCHMARKS[name].tool == "evalplus" else model)
        print(f"$ {shlex.join(redact.arguments(command))}", file=file, flush=True)
        streams: dict[str, Any] = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        code = subprocess.run(command, env=environment(cfg, name), **streams).returncode
    scores = {} if code else read_scores(name, directory)
    if not scores:
        what = f"exit code {code}" if code else "it wrote no result"
        return "\n".join([f"{what}; the end of {log}:", *log.read_text().splitlines()[-_LAST_LINES:]])
    result = {
        "settings": settings(cfg, name, model),
        "model": str(model),
        "seconds": round(time.monotonic() - started, 1),
        "scores": scores,
    }
    write_json(directory / "result.json", result)
    return None


@contextlib.contextmanager
def _short_path(model: Path) -> Iterator[Path]:
    """Yield a link to the model's directory: evalplus names a file after the whole path, which may be too long for a file
    name, and fails only when all solutions are written."""
    with tempfile.TemporaryDirectory(prefix="frpo-") as directory:
        link = Path(directory) / "model"
        link.symlink_to(model.resolve())
        yield link


def read_scores(name: str, directory: Path) -> dict[str, float]:
    """Return flat numbers from the files that the tool of benchmark `name` wrote to `directory`; {} if it has no result."""
    benchmark = BENCHMARKS[name]
    if benchmark.tool == "evalplus":
        files = list((directory / benchmark.task).glob("*_eval_results.json"))
        return _pass_at_1(json.loads(files[0].read_text())["eval"]) if files else {}
    files = sorted(directory.glob("lm_eval_*.json"))
    if not files:
        return {}
    numbers = json.loads(files[-1].read_text())["results"][benchmark.task]
    # Keys are "metric,filter"; where lm-eval computes no standard error, its value is the text "N/A".
    return {
        key.removesuffix(",none"): float(value)
        for key, value in numbers.items()
        if "," in key and isinstance(value, int | float)
    }


def finished_scores(cfg: EvaluateRun, name: str, model: Path) -> dict[str, float] | None:
    """Return the scores that an earlier start left in cfg.out; None if there are none. Raises ConfigError when they are of
    other settings or weights."""
    file = Path(cfg.out) / name / "result.json"
    if not file.is_file():
        return None
    result = json.loads(file.read_text())
    now, then = settings(cfg, name, model), result["settings"]
    for key in now:
        if then.get(key) != now[key]:
            shown = "other weights" if key == "weights" else f"{key}={then.get(key)}, not {now[key]}"
            raise ConfigError(f"{file} is a result with {shown}; choose another out, or remove {file.parent}.")
    return result["scores"]


def write_summary(out: str) -> None:
    """Write results.json: the scores of all finished benchmarks and of the probe in `out`, "NAME/score": number."""
    files = {name: Path(out) / name / "result.json" for name in (*BENCHMARKS, PROBE)}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    flat = {f"{name}/{score}": value for name, r in results.items() for score, value in r["scores"].items()}
    write_json(Path(out) / "results.json", flat)


def _pass_at_1(problems: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the share of problems whose one, greedy solution passes. "plus" counts solutions that also pass the original
    tests, as evalplus prints it."""
    solutions = [solution for solutions in problems.values() for solution in solutions]
    base = [solution["base_status"] == "pass" for solution in solutions]
    plus = [passed and s["plus_status"] == "pass" for passed, s in zip(base, solutions, strict=True)]
    return {"pass@1": sum(plus) / len(plus), "base_pass@1": sum(base) / len(base)}


def _table(cfg: EvaluateRun, model: Path, failed: list[str]) -> Table:
    table = Table(title=f"{cfg.model.path}" + (f", {cfg.limit} questions per task" if cfg.limit else ""))
    for heading in ("benchmark", "score", "value", "standard error"):
        table.add_column(heading, justify="right" if heading in ("value", "standard error") else "left")
    for name in cfg.benchmarks:
        if name in failed:
            table.add_row(name, "failed", "", "")
            continue
        scores = finished_scores(cfg, name, model)
        for i, score in enumerate(BENCHMARKS[name].shown):
            error = scores.get(f"{score}_stderr")
            shown = "" if error is None else f"{error:.3f}"
            table.add_row("" if i else name, score, f"{scores[score]:.3f}", shown)
    return table


def write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")
