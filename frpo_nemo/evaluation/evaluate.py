"""All measurements of one finished model: the reward probe, then the benchmarks."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

from rich.console import Console

from frpo_nemo.conversion.inputs import ConvertRun, check_conversion
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_checks import check_benchmarks, check_model, model_directory
from frpo_nemo.evaluation.benchmark_commands import weights_stamp
from frpo_nemo.evaluation.benchmark_runs import PROBE, run_benchmarks, write_json, write_summary
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.evaluation.reward_probe import (
    SAMPLES,
    check_host_memory,
    check_reward_probe,
    probe_settings,
    run_reward_probe,
)
from frpo_nemo.megatron.checkpoint import files as checkpoint_files
from frpo_nemo.processes.launcher import started_world


def evaluate(cfg: EvaluateRun, *, only_check: bool = False) -> bool:
    """Measure what has no result in cfg.out yet; returns whether everything has one in the end. Raises ConfigError for a
    mistake in the options before anything is measured. only_check: export and measure nothing; for a checkpoint only the
    options are checked, because its context and tokenizer are those of its export."""
    from frpo_nemo.training.run import ignore_warnings_of_libraries

    ignore_warnings_of_libraries()
    check_options(cfg)
    if cfg.probe.prompts:
        check_host_memory(cfg.probe, processes=started_world()[1])
    if (Path(cfg.model.path) / checkpoint_files.RECORD).is_file():
        if only_check:
            print(f"options OK; {cfg.model.path} is a checkpoint, and its export is checked after it is written")
            return True
        cfg.model.path = str(exported(Path(cfg.model.path), Path(cfg.out) / "hf"))
    model = check_model(cfg) if cfg.benchmarks else model_directory(cfg.model.path)
    if only_check:
        print(f"configuration OK for {model}")
        return True
    probed = _probe(cfg, model) if cfg.probe.prompts else True
    return (run_benchmarks(cfg, model) if cfg.benchmarks else True) and probed


def check_options(cfg: EvaluateRun) -> None:
    """Check the options as far as neither the model nor the machine matters. Raises ConfigError."""
    if not cfg.benchmarks and not cfg.probe.prompts:
        raise ConfigError("Nothing to measure: give benchmarks=[...], or a probe with prompts and reward.")
    if cfg.benchmarks:
        check_benchmarks(cfg)
    if cfg.probe.prompts:
        check_reward_probe(cfg.probe, cfg.dtype)


def exported(checkpoint: Path, out: Path) -> Path:
    """Return `out`, with the checkpoint in Hugging Face format: written unless an earlier start wrote it."""
    if started_world()[1] > 1:
        raise ConfigError(
            f"model.path={checkpoint} is a checkpoint, which one process has to export; start one process."
        )
    source = out / "exported_from.json"
    if source.is_file():
        if json.loads(source.read_text()) != str(checkpoint.resolve()):
            raise ConfigError(f"{out} is the export of another checkpoint; choose another out, or remove it.")
        return out
    conversion = ConvertRun(input=str(checkpoint), out=str(out))
    check_conversion(conversion)
    # In a separate process: what lets megatron-core run on a CPU must not be loaded when vLLM starts.
    process = multiprocessing.get_context("spawn").Process(target=_convert, args=(conversion,))
    process.start()
    process.join()
    if process.exitcode:
        raise ConfigError(f"{checkpoint} could not be exported (exit code {process.exitcode}); the reason is above.")
    write_json(source, str(checkpoint.resolve()))
    return out


def _convert(conversion: ConvertRun) -> None:
    from frpo_nemo.conversion.convert import convert

    convert(conversion)


def _probe(cfg: EvaluateRun, model: Path) -> bool:
    """Measure, write and print. Returns False if a reward scored none of the responses. Then no result is written, so that
    the same command measures again, but the responses and what the other rewards gave them are kept."""
    directory = Path(cfg.out) / PROBE
    file, settings = directory / "result.json", probe_settings(cfg) | {"weights": weights_stamp(model)}
    silent: list[str] = []
    if file.is_file():
        result = json.loads(file.read_text())
        if result["settings"] != settings:
            raise ConfigError(f"{file} is a result with other settings or weights; choose another out, or remove it.")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        scores = run_reward_probe(cfg, model, directory)
        silent = [name for name in cfg.probe.reward if not scores[f"scored/{name}"]]
        if started_world()[0] > 0:
            return not silent
        result = {"settings": settings, "model": str(model), "scores": scores}
        if not silent:
            write_json(file, result)
            write_summary(cfg.out)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    shown = {name: value for name, value in result["scores"].items() if name.endswith("/mean")}
    console.print("probe: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if silent:
        console.print(
            f"probe failed: {', '.join(silent)} scored no response; the reason is above. The responses are in "
            f"{directory / SAMPLES}; the same command measures again.",
            style="red",
        )
    return not silent
