"""What a standard benchmark is here: the task of lm-eval or evalplus, its settings, and the command that runs it.

Every setting that changes a score is written out below instead of being left to the tool's files. Prompts, data,
generation and scoring are the tools'. Neither is imported here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo_nemo.config.option import option
from frpo_nemo.evaluation.reward_probe import RewardProbeConfig

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
ANTLR = "4.11"  # that sympy's LaTeX parser and lm-eval's minerva_math ask for; omegaconf has 4.9

# How lm-eval's tasks are answered. A task's own stop strings may belong to its few-shot text ("Problem:" of minerva's cuts
# answers that restate the problem), and with hf a model's generation_config.json would bring a repetition penalty.
GREEDY = {"until": [], "do_sample": False, "temperature": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Benchmark:
    tool: str  # the package: lm_eval or evalplus
    task: str  # its name there
    shown: tuple[str, ...]  # scores for the table, the main one first
    answer_tokens: int | None  # the longest answer; None: answers are chosen by their probability, not written
    fewshot: int = 0
    chat: bool = True  # prompts go through the model's chat template
    system: str | None = None
    parses_latex: bool = False  # needs antlr4 4.11


# math500, mbpp_plus: as the FRPO paper evaluates. mmlu: 5-shot without chat template, the usual of published numbers.
# evalplus has no option for the length of answers.
BENCHMARKS = {
    "math500": Benchmark("lm_eval", "minerva_math500", ("math_verify",), 2048, system=BOXED, parses_latex=True),
    "mbpp_plus": Benchmark("evalplus", "mbpp", ("pass@1", "base_pass@1"), 768),
    "humaneval_plus": Benchmark("evalplus", "humaneval", ("pass@1", "base_pass@1"), 768),
    "mmlu": Benchmark("lm_eval", "mmlu", ("acc",), None, fewshot=5, chat=False),
    "ifeval": Benchmark("lm_eval", "ifeval", ("prompt_level_strict_acc", "inst_level_strict_acc"), 1280),
}


@dataclass
class EvaluatedModel:
    path: str = option(
        "Directory in Hugging Face format, hub name, run directory (its hf/), or a checkpoint of a run.",
        example="runs/first",
    )


@dataclass
class EvaluateRun:
    """recipes/evaluate.py"""

    model: EvaluatedModel = option("The model to measure.", EvaluatedModel)
    out: str = option("Directory for results; what is finished there is not repeated.", example="runs/first/eval")
    benchmarks: list[str] = option(f"List of benchmarks: {', '.join(BENCHMARKS)}.", list)
    probe: RewardProbeConfig = option(
        "Reward on prompts of your own; probe=safety_benchmarks is a choice.", RewardProbeConfig
    )
    limit: int | None = option(
        "Number of questions per task (of MMLU, per subject), for a try; null: all.", None, at_least=1
    )
    backend: str = option(
        "What generates: vLLM, or transformers (hf) where there is no vLLM for GPUs.", "vllm", choices=("vllm", "hf")
    )
    dtype: str = option("Of weights and computation.", "bfloat16")
    tensor_parallel_size: int = option("GPUs that vLLM spreads the model over.", 1, at_least=1)
    batch_size: int | None = option(
        "Questions at a time in lm-eval; null: as vLLM decides, and 1 with hf.", None, at_least=1
    )
    max_model_len: int | None = option(
        "Longest question with answer in tokens, in lm-eval; null: what the model allows.", None, at_least=1
    )
    max_gen_tokens: int | None = option(
        "Longest answer with its thoughts in tokens, in lm-eval; null: 2048 in math500, 1280 in ifeval.",
        None,
        at_least=1,
    )
    think_end_token: str | None = option(
        "What ends the thoughts of a model, as '</think>': math500 and ifeval judge what follows it.", None
    )
    enable_thinking: bool | None = option(
        "Value of enable_thinking in the chat template; null: the template has no such variable.", None
    )
    include_path: str | None = option(
        "Directory of lm-eval task files that come before its own: say, tasks with local data.", None
    )
    antlr_path: str | None = option(
        "Directory with antlr4-python3-runtime 4.11, for math500; null: antlr-4.11 in sys.prefix.", None
    )


def command_line(cfg: EvaluateRun, name: str, model: Path) -> list[str]:
    """The command that runs benchmark `name` and writes its files to cfg.out/name."""
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
    """The longest answer in tokens; 0 where none is written."""
    if benchmark.tool == "evalplus" or not benchmark.answer_tokens:
        return benchmark.answer_tokens or 0
    return cfg.max_gen_tokens or benchmark.answer_tokens


def environment(cfg: EvaluateRun, name: str) -> dict[str, str]:
    """Of the tool's process. What the user set stays."""
    defaults = {"VLLM_PLUGINS": "", "TOKENIZERS_PARALLELISM": "false"}  # nemo-toolkit registers a plugin
    # Safe path: `import evaluate` in lm-eval must not find recipes/evaluate.py in the working directory.
    variables = defaults | os.environ | {"PYTHONSAFEPATH": "1"}
    if BENCHMARKS[name].parses_latex:
        before = [variables["PYTHONPATH"]] if variables.get("PYTHONPATH") else []
        variables["PYTHONPATH"] = os.pathsep.join([str(antlr_directory(cfg)), *before])
    return variables


def settings(cfg: EvaluateRun, name: str, model: Path) -> dict[str, Any]:
    """What makes two results of one benchmark comparable, or not."""
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
    """Changes when the weights are written anew, as a run that goes on does; a move or a link keeps it."""
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
    """lm-eval's model_args for a model that thinks."""
    return {"think_end_token": cfg.think_end_token, "enable_thinking": cfg.enable_thinking}
