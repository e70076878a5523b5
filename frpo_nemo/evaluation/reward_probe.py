"""Measures a finished model's reward on any prompts, with the reward functions of training and responses from vLLM."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from frpo_nemo import redact
from frpo_nemo.config.option import check_values
from frpo_nemo.config.options import EngineConfig, ModelConfig
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.options import EvaluateRun, RewardProbeConfig
from frpo_nemo.planning.memory import readable
from frpo_nemo.rewards.reward_set import build_rewards, check_rewards, local_weights
from frpo_nemo.training.checks.data import check_reward_tasks, check_source_list
from frpo_nemo.training.checks.resources import host_memory

PRECISION = {"bfloat16": "bf16", "float32": "fp32"}
SAMPLES = "samples.jsonl"


def check_reward_probe(probe: RewardProbeConfig, dtype: str) -> None:
    """Check the probe's options before a model loads. Raises ConfigError."""
    if not probe.reward:
        raise ConfigError("probe.prompts is given, but probe.reward is empty; name what scores the responses.")
    check_values(probe, "probe.")
    if probe.temperature != 1 and probe.top_p < 1:
        raise ConfigError(f"probe.top_p={probe.top_p} needs probe.temperature=1, but it is {probe.temperature}.")
    if probe.temperature == 0 and probe.samples > 1:
        raise ConfigError(
            f"probe.samples={probe.samples}: with probe.temperature=0 all would be the same; set probe.samples=1."
        )
    if dtype not in PRECISION:
        raise ConfigError(f"dtype={dtype} must be {' or '.join(PRECISION)} for a probe.")
    columns = check_source_list([(f"probe.prompts.{i}", source) for i, source in enumerate(probe.prompts)])
    check_rewards(probe.reward, columns)
    check_reward_tasks(probe.reward, probe.prompts)


def check_host_memory(probe: RewardProbeConfig, processes: int) -> None:
    """Raise ConfigError when the reward models that each of this machine's `processes` loads exceed its memory, which also
    has to hold the policy's weights."""
    each, host = sum(model.bytes for model in local_weights(probe.reward)), host_memory()
    if processes * each > host:
        raise ConfigError(
            f"Local reward models need {readable(processes * each)} of host memory, {readable(each)} in each of {processes} "
            f"processes, but the host has {readable(host)}; give the job more (sbatch --mem), or use servers (remote.url, "
            "docs/reward_models.md)."
        )


def run_reward_probe(cfg: EvaluateRun, model: Path, directory: Path) -> dict[str, float]:
    """Return rewards, lengths and shares of failures as training logs them, and how many responses each reward scored.
    Writes every response to directory/SAMPLES, scored or not. Every process of the world calls this, and all get the
    numbers."""
    from frpo_nemo.processes import world
    from frpo_nemo.processes.phases import PhaseTimer
    from frpo_nemo.rollout.worker import RolloutWorker, ScoredPrompts
    from frpo_nemo.training.statistics import rollout_statistics, scored_counts

    probe = cfg.probe
    rank, _ = world.start_world()
    rewards = build_rewards(probe.reward)  # first, so that reward errors surface before the model loads
    worker = RolloutWorker(
        ModelConfig(path=str(model), precision=PRECISION[cfg.dtype], chat_template_args=_template_args(cfg)),
        EngineConfig(
            temperature=probe.temperature,
            top_p=probe.top_p,
            tensor_model_parallel_size=cfg.tensor_parallel_size,
            gpu_memory_utilization=0.9,
            think_end_token=cfg.think_end_token,
        ),
        PhaseTimer(),
        seed=probe.seed,
        max_model_len=probe.max_prompt_tokens + probe.max_response_tokens,
        load_format="safetensors",
    )
    scored = ScoredPrompts.load(probe.prompts, rewards, worker.chat, probe.max_prompt_tokens)
    if rank == 0 and scored.prompts.dropped:
        print(f"probe: {scored.prompts.dropped} prompts longer than probe.max_prompt_tokens are left out", flush=True)
    everything, limit = range(len(scored.prompts)), probe.max_response_tokens
    rollouts = worker.roll_out(scored, everything, samples=probe.samples, max_tokens=limit, seed_step=0)
    if rank == 0:
        worker.write_samples(directory / SAMPLES, rollouts)
    scored.rewards.close()
    worker.close()
    return rollout_statistics(rollouts) | scored_counts(rollouts)


def probe_settings(cfg: EvaluateRun) -> dict[str, Any]:
    """Return the settings that decide whether two results are comparable."""
    thinking = {name: getattr(cfg, name) for name in ("think_end_token", "enable_thinking")}
    given = {name: value for name, value in thinking.items() if value is not None}
    return redact.values(json.loads(json.dumps(asdict(cfg.probe)))) | {"dtype": cfg.dtype} | given


def _template_args(cfg: EvaluateRun) -> dict[str, Any]:
    return {} if cfg.enable_thinking is None else {"enable_thinking": cfg.enable_thinking}
