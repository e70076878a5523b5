"""The options of recipes/evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass

from frpo_nemo.config.option import option
from frpo_nemo.config.options import RewardConfig, SourceConfig
from frpo_nemo.evaluation.benchmarks import BENCHMARKS


@dataclass
class EvaluatedModel:
    path: str = option(
        "Directory in Hugging Face format, hub name, run directory (its hf/), or a checkpoint of a run.",
        example="runs/first",
    )


@dataclass
class RewardProbeConfig:
    """Prompts, rewards, and how to sample."""

    prompts: list[SourceConfig] = option(
        "List of sources like those of data.train in recipes/frpo.py; none: no probe.", list
    )
    reward: dict[str, RewardConfig] = option("Mapping of rewards, like reward in recipes/frpo.py.", dict)
    samples: int = option("Responses to each prompt.", 1, at_least=1)
    max_prompt_tokens: int = option("Longest prompt in tokens; longer ones are dropped.", 1024, at_least=1)
    max_response_tokens: int = option("Longest response in tokens.", 2048, at_least=1)
    temperature: float = option(
        "Temperature of sampling; vLLM samples at 0.01 where it is lower. 0: the likeliest token each time.",
        1.0,
        at_least=0.01,
        also=0,
    )
    top_p: float = option("Sample from the likeliest tokens of this total probability.", 1.0, above=0, at_most=1)
    seed: int = option("Seed of sampling.", 1)


@dataclass
class EvaluateRun:
    """recipes/evaluate.py"""

    model: EvaluatedModel = option("The model to measure.", EvaluatedModel)
    out: str = option("Directory for results; finished measurements are not repeated.", example="runs/first/eval")
    benchmarks: list[str] = option(f"List of benchmarks: {', '.join(BENCHMARKS)}.", list)
    probe: RewardProbeConfig = option(
        "Reward on prompts of your own; probe=safety_benchmarks is a choice.", RewardProbeConfig
    )
    limit: int | None = option(
        "Number of questions per task (for MMLU, per subject), for a quick try; null: all.", None, at_least=1
    )
    backend: str = option(
        "What generates: vLLM, or transformers (hf) where vLLM has no GPU.", "vllm", choices=("vllm", "hf")
    )
    dtype: str = option("Precision of weights and computation.", "bfloat16")
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
        "What ends the thoughts of a model, as '</think>': math500, ifeval and the probe's rewards judge what follows it.", None
    )
    enable_thinking: bool | None = option(
        "Value of enable_thinking in the chat template; null: the template has no such variable.", None
    )
    include_path: str | None = option(
        "Directory of lm-eval task files that take precedence over its own, such as tasks with local data.", None
    )
    antlr_path: str | None = option(
        "Directory with antlr4-python3-runtime 4.11, for math500; null: antlr-4.11 in sys.prefix.", None
    )
