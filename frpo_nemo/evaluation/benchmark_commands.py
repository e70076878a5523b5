"""The lm-eval or evalplus command that runs a benchmark. Neither tool is imported here."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

from frpo_nemo.evaluation.benchmarks import BENCHMARKS, GREEDY, Benchmark
from frpo_nemo.evaluation.options import EvaluateRun

ANTLR = "4.11"  # required by sympy's LaTeX parser and lm-eval's minerva_math; omegaconf has 4.9


def command_line(cfg: EvaluateRun, name: str, model: Path) -> list[str]:
    """Return the command that runs benchmark `name` and writes its files to cfg.out/name."""
    benchmark, directory = BENCHMARKS[name], (Path(cfg.out) / name).resolve()
    if benchmark.tool == "evalplus":
        flags = {"model": model, "dataset": benchmark.task, "root": directory, "backend": cfg.backend}
        flags |= {"dtype": cfg.dtype, "tp": cfg.tensor_parallel_size}
        module = "evalplus.evaluate" if cfg.backend == "vllm" else "frpo_nemo.evaluation.evalplus_with_hf"
        return [sys.executable, "-m", module, *(f"--{k}={v}" for k, v in flags.items()), "--greedy"]
    arguments: dict[str, Any] = {"pretrained": str(model), "dtype": cfg.dtype}
    if cfg.max_model_len:
        arguments["max_length"] = cfg.max_model_len
    if cfg.backend == "vllm":
        arguments["tensor_parallel_size"] = cfg.tensor_parallel_size
    if benchmark.answer_tokens:
        arguments |= {key: value for key, value in _thinking(cfg).items() if value is not None}
    # lm-eval's own "auto" runs hf on 64 sequences of the whole context, five times, before the first question.
    batch_size = cfg.batch_size or ("auto" if cfg.backend == "vllm" else 1)
    command = [sys.executable, "-m", "frpo_nemo.evaluation.strict_lm_eval", "run", "--model", cfg.backend]
    command += ["--model_args", json.dumps(arguments), "--batch_size", str(batch_size)]
    command += ["--tasks", benchmark.task, "--num_fewshot", str(benchmark.fewshot)]
    command += ["--output_path", str(directory / "lm_eval.json")]
    if benchmark.chat:
        command += ["--apply_chat_template"]
    if benchmark.system:
        command += ["--system_instruction", benchmark.system]
    if benchmark.answer_tokens:
        command += ["--log_samples", "--gen_kwargs", json.dumps(_generation(cfg, benchmark))]
    if cfg.limit:
        command += ["--limit", str(cfg.limit)]
    if cfg.include_path:
        command += ["--include_path", str(Path(cfg.include_path).resolve())]
    return command


def answer_tokens(cfg: EvaluateRun, benchmark: Benchmark) -> int:
    """Return the length of the longest answer in tokens; 0 where none is written."""
    if benchmark.tool == "evalplus" or not benchmark.answer_tokens:
        return benchmark.answer_tokens or 0
    return cfg.max_gen_tokens or benchmark.answer_tokens


def environment(cfg: EvaluateRun, name: str) -> dict[str, str]:
    """Return the environment of the tool's process. The user's own settings stay."""
    defaults = {"VLLM_PLUGINS": "", "TOKENIZERS_PARALLELISM": "false"}  # nemo-toolkit registers a plugin
    # Safe path: `import evaluate` in lm-eval must not find recipes/evaluate.py in the working directory.
    variables = defaults | os.environ | {"PYTHONSAFEPATH": "1"}
    if BENCHMARKS[name].parses_latex:
        before = [variables["PYTHONPATH"]] if variables.get("PYTHONPATH") else []
        variables["PYTHONPATH"] = os.pathsep.join([str(antlr_directory(cfg)), *before])
    return variables


def settings(cfg: EvaluateRun, name: str, model: Path) -> dict[str, Any]:
    """Return the settings that decide whether two results of one benchmark are comparable."""
    benchmark = BENCHMARKS[name]
    common = {
        "tool": tool_version(benchmark.tool),
        "backend": cfg.backend,
        "dtype": cfg.dtype,
        "weights": weights_stamp(model),
    }
    if benchmark.tool == "evalplus":
        return common
    own = {"limit": cfg.limit, "max_model_len": cfg.max_model_len, "include_path": cfg.include_path}
    if benchmark.answer_tokens:
        own |= _generation(cfg, benchmark) | _thinking(cfg)
    return common | own


def weights_stamp(model: Path) -> str:
    """Return a text that changes when the weights are written again, as by a continued run; a move or a link keeps it."""
    files = sorted(model.glob("*.safetensors"))
    stamps = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join(stamps).encode()).hexdigest()[:16]


def tool_version(tool: str) -> str:
    return f"{tool.replace('_', '-')} {importlib.metadata.version(tool)}"


def antlr_directory(cfg: EvaluateRun) -> Path:
    return Path(cfg.antlr_path or Path(sys.prefix) / f"antlr-{ANTLR}").resolve()


def _generation(cfg: EvaluateRun, benchmark: Benchmark) -> dict[str, Any]:
    """lm-eval's gen_kwargs."""
    return GREEDY | {"max_gen_toks": answer_tokens(cfg, benchmark)}


def _thinking(cfg: EvaluateRun) -> dict[str, Any]:
    """Return lm-eval's model_args for a model that thinks."""
    return {"think_end_token": cfg.think_end_token, "enable_thinking": cfg.enable_thinking}
