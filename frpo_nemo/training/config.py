"""The configuration schema: every option, its type and its only default.

configs/frpo.yaml and configs/sft.yaml document the options, and a test keeps the two equal. cli.py composes;
validate.py has the checks that need more than a type.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def required(example: str):
    """A field without a default; the message about a missing value shows `example`."""
    return field(default=MISSING, metadata={"example": example})


@dataclass
class LoRAConfig:
    """Adapters on every layer's q, k, v, o, gate, up and down; all other weights are frozen."""

    rank: int = 0  # 0: none, all weights are trained
    alpha: float = 64.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # of an adapter's input, in supervised training

    @classmethod
    def of_record(cls, lora: dict[str, Any] | None) -> LoRAConfig:
        """For the weights of a checkpoint whose record has `lora`."""
        return cls(rank=lora["rank"], alpha=lora["alpha"]) if lora else cls()


@dataclass
class ModelConfig:
    path: str = required("Qwen/Qwen2.5-7B-Instruct")  # Hugging Face directory or hub name
    precision: str = "bf16"  # bf16 (fp32 main weights and gradients) or fp32
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1  # above 1 needs Transformer Engine
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None  # uneven split; None: even
    num_layers_in_last_pipeline_stage: int | None = None
    recompute: str = "none"  # activations to compute again in the backward pass: none or full (every layer)
    fp8: str | None = None  # None, hybrid or e4m3; needs Transformer Engine
    fp8_recipe: str = "delayed"  # delayed, tensorwise or blockwise
    logprob_chunk_tokens: int = 1024  # tokens whose full-vocabulary fp32 logits exist at one time
    lora: LoRAConfig = field(default_factory=LoRAConfig)


@dataclass
class OptimizerConfig:
    lr: float = required("1e-6")
    min_lr: float = 0.0  # where the cosine ends
    schedule: str = "constant"  # constant or cosine, after the warm-up
    warmup_ratio: float = 0.0  # share of max_steps, linear from 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad: float = 1.0  # global gradient norm; 0 turns clipping off


@dataclass
class SourceConfig:
    """One data set. `path`: a file (.jsonl, .json, .parquet, .csv), a directory of them, a hub name, or `world:...` (the
    embedded task). `prompt` and `completion`: a column, or a template of several, "{instruction}\n\n{input}"."""

    path: str = required("prompts.jsonl")
    split: str = "train"  # for a hub name
    prompt: str = "prompt"  # a string, or a list of chat messages
    completion: str | None = None  # a string (SFT); where it is prompt's column, the last assistant turn there
    completion_until: str | None = None  # text at which completions are cut off
    task: str | None = None  # the task of every example, or ...
    task_column: str | None = None  # ... the column that names it; rewards choose examples by task
    system_prompt: str | None = None  # put before every prompt
    limit: int | None = None  # the first so many rows
    start: int = 0  # skip so many rows first (a validation set cut from the same file)
    at_least: dict[str, float] | None = None  # of those rows, keep the ones with these values or higher
    where: dict[str, str] | None = None  # of those rows, keep the ones with just these values
    holdout: float = 0.0  # share of what is left that is held out, at random
    holdout_by: str | None = None  # column of which every value gives this share of its rows
    holdout_seed: int = 1  # which rows; the same for both sides
    held_out: bool = False  # take the rows that are held out, else the others
    sample: int | None = None  # of the rows that are left, so many, drawn at random
    sample_seed: int = 1  # of that draw
    streaming: bool = False  # read up to the last row that is needed, instead of downloading the whole set


@dataclass
class DataConfig:
    train: list[SourceConfig] = required("[{path: prompts.jsonl}]")
    validation: list[SourceConfig] = field(default_factory=list)
    max_prompt_tokens: int = 1024  # longer prompts are dropped and counted
    shuffle: bool = True


@dataclass
class EngineConfig:
    """The colocated vLLM engines, and how they sample."""

    temperature: float = 1.0  # also of the log-probs in training
    top_p: float = 1.0
    top_k: int = -1  # -1: all tokens
    tensor_model_parallel_size: int = 1  # of each vLLM engine
    gpu_memory_utilization: float = 0.6  # share of GPU memory for vLLM
    max_num_seqs: int = 256  # sequences that one engine decodes together
    enforce_eager: bool = False  # True: no CUDA graphs
    refit_bucket_mb: int = 512  # memory bound of the weight stream
    logprob_gap_threshold: float | None = None  # largest mean |logp_megatron - logp_vllm|; None: by precision


@dataclass
class RolloutConfig(EngineConfig):
    prompts_per_step: int = required("16")
    group_size: int = 8  # responses per prompt (G)
    max_response_tokens: int = required("2048")
    importance_correction: str = "none"  # weights against that gap: none, per token or per sequence
    importance_limit: float = 2.0  # largest of those weights


@dataclass
class RewardConfig:
    """One reward function; `args` are keyword arguments of `target` (an import path or a built-in name)."""

    target: str = required("math")
    weight: float = 1.0
    tasks: list[str] | None = None  # None: every example
    args: dict[str, Any] = field(default_factory=dict)
    timeout: float = 10.0  # seconds per response, then None
    isolate: bool = False  # run in worker processes that may be killed
    workers: int = 2  # processes, when isolated


@dataclass
class ProbeConfig:
    """Does fine-tuning keep what was learned before? Reward on prompts of the first stage, and KL from its policy."""

    interval: int = 0  # steps between probes; 0: none. Also before the first and after the last step
    prompts: list[SourceConfig] = field(default_factory=list)
    reward: dict[str, RewardConfig] = field(default_factory=dict)
    samples: int = 1  # responses to each prompt
    max_response_tokens: int = 2048


@dataclass
class TrainerConfig:
    num_nodes: int = 1
    devices: int = 1  # processes per node; num_nodes * devices must equal the world that was started
    max_steps: int = required("500")
    seed: int = 1
    microbatch_tokens: int = 8192  # token budget of a packed microbatch
    val_interval: int = 0  # steps between validations; 0: none. Also before the first and after the last step
    save_interval: int = 0  # steps between checkpoints; 0: only at the end
    phase_timeout: float = 1800.0  # seconds that one phase may take before the watchdog ends the job


@dataclass
class FRPOTrainerConfig(TrainerConfig):
    updates_per_rollout: int = 1  # optimizer steps per rollout batch, on minibatches of whole groups


@dataclass
class CheckpointConfig:
    keep_last: int = 2
    keep_best: bool = True  # by validation reward
    resume: str = "auto"  # auto (continue the newest in run_dir, if any), never, or the path of a checkpoint


@dataclass
class LoggingConfig:
    tensorboard: bool = True
    wandb_project: str | None = None  # None: no W&B
    wandb_name: str | None = None


@dataclass
class FRPORun:
    """recipes/frpo.py"""

    run_dir: str = required("runs/first")
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: Any = required("frpo")  # configs/objective/*.yaml: `name` of a registered objective, or `_target_`
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: dict[str, RewardConfig] = required("gsm8k")
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    trainer: FRPOTrainerConfig = field(default_factory=FRPOTrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


@dataclass
class SFTDataConfig(DataConfig):
    sequences_per_step: int = required("32")  # global batch
    max_tokens: int = 2048  # prompt and completion; longer examples are dropped and counted


@dataclass
class SFTRun:
    """recipes/sft.py"""

    run_dir: str = required("runs/first")
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)  # of the probe's responses
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
