"""Define every option of a training run, once (option.py). cli.py composes a run; training/checks/config.py checks that
options fit each other, the model, the data and the machine. `make options` writes docs/options.md from this file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from frpo_nemo.config.option import option


@dataclass
class LoRAConfig:
    rank: int = option("Rank of the adapters' updates; 0: no adapters, all weights are trained.", 0, at_least=0)
    alpha: float = option("The updates are scaled by alpha / rank.", 64.0, above=0)
    dropout: float = option(
        "Share of an adapter's inputs dropped in recipes/sft.py; recipes/frpo.py needs 0.", 0.0, at_least=0, below=1
    )

    @classmethod
    def of_record(cls, lora: dict[str, Any] | None) -> LoRAConfig:
        """Return the options for the weights of a checkpoint whose record has `lora`."""
        return cls(rank=lora["rank"], alpha=lora["alpha"]) if lora else cls()


@dataclass
class ModelConfig:
    path: str = option(
        "Directory (or hub name) with config.json, safetensors and tokenizer.", example="Qwen/Qwen2.5-7B-Instruct"
    )
    precision: str = option(
        "Precision of weights and computation; with bf16, main weights and gradients stay fp32.",
        "bf16",
        choices=("bf16", "fp32"),
    )
    tensor_model_parallel_size: int = option(
        "Ranks that share every matrix; divides the attention heads.", 1, at_least=1, may_change=True
    )
    pipeline_model_parallel_size: int = option(
        "Ranks that share the layers, each a stage of consecutive ones.", 1, at_least=1, may_change=True
    )
    context_parallel_size: int = option(
        "Ranks that share the tokens of every sequence; above 1 needs Transformer Engine.",
        1,
        at_least=1,
        may_change=True,
    )
    expert_model_parallel_size: int = option(
        "Ranks that share the experts of a mixture; divides the experts and the ranks of a pipeline stage.",
        1,
        at_least=1,
        may_change=True,
    )
    fp32_router: bool = option("Choose experts by scores computed in fp32; vLLM computes them in its precision.", True)
    expert_balance: float = option(
        "Weight of the loss that balances the load of experts (docs/moe.md); 0: none, as is usual in RL.", 0.0, at_least=0
    )
    sequence_parallel: bool = option(
        "Split activations outside the matrices over the tensor ranks, which saves memory.", False, may_change=True
    )
    num_layers_in_first_pipeline_stage: int | None = option(
        "Layers of the first stage; null: as many as the others.", None, at_least=1, may_change=True
    )
    num_layers_in_last_pipeline_stage: int | None = option(
        "Layers of the last stage, which has the logits; null: as many as the others.",
        None,
        at_least=1,
        may_change=True,
    )
    recompute: str = option(
        "Layers whose activations are recomputed in the backward pass: none, or all (full).",
        "none",
        choices=("none", "full"),
        may_change=True,
    )
    fp8: str | None = option(
        "Format of FP8 matrix products, which need Transformer Engine; null: no FP8.", None, choices=("hybrid", "e4m3")
    )
    fp8_recipe: str = option(
        "How the scales of FP8 are computed.", "delayed", choices=("delayed", "tensorwise", "blockwise")
    )
    fp32_logits: bool = option("Multiply by the output layer in fp32, in the trainer and in vLLM.", False)
    logprob_chunk_tokens: int = option(
        "Tokens whose fp32 logits over the full vocabulary exist at one time.", 1024, at_least=1, may_change=True
    )
    lora: LoRAConfig = option("Adapters on q, k, v, o, gate, up and down, trained instead of the weights.", LoRAConfig)
    chat_template_args: dict[str, Any] = option(
        "Variables of the chat template, such as {enable_thinking: false}; also for validation and probes.", dict
    )


@dataclass
class OptimizerConfig:
    lr: float = option("Learning rate after the warm-up.", above=0, example="1e-6")
    min_lr: float = option(
        "Learning rate that the cosine would reach one update after the last; at most lr.", 0.0, at_least=0
    )
    schedule: str = option(
        "Schedule of the learning rate after the warm-up.", "constant", choices=("constant", "cosine")
    )
    warmup_ratio: float = option(
        "Share of the updates that warm up; of W such updates, the nth uses n / W of lr.", 0.0, at_least=0, below=1
    )
    adam_beta1: float = option("Decay per update of the mean of gradients.", 0.9, at_least=0, below=1)
    adam_beta2: float = option("Decay per update of the mean of squared gradients.", 0.95, at_least=0, below=1)
    adam_eps: float = option("Added to the root of the mean of squared gradients.", 1e-8, above=0)
    weight_decay: float = option(
        "Share of a matrix, times the learning rate, subtracted per update; norms and biases are not decayed.",
        0.0,
        at_least=0,
    )
    clip_grad: float = option("Largest global norm of the gradient; 0: no clipping.", 1.0, at_least=0)


@dataclass
class SourceConfig:
    path: str = option(
        "Files: .jsonl, .json, .csv, .tsv, .parquet (also .gz and .zst of them), DIR or DIR/*.json; or a data set: "
        "owner/name[:config] on the hub; or python:package.module.function?name=value, a function that returns rows.",
        example="prompts.jsonl",
    )
    split: str = option(
        "Split of a directory or hub data set, or a part of it, such as train[:10%]; a file is train.", "train"
    )
    prompt: str = option(
        'Column with text or chat messages, or a template of columns, "{instruction}[[\\n\\n{input}]]"; a part in [[ ]] '
        "vanishes with an empty column; other braces are doubled: \\boxed{{x}}.",
        "prompt",
    )
    completion: str | None = option(
        "Column or template of the answer to learn; if it is the column of prompt, the last assistant turn there.", None
    )
    completion_until: str | None = option('Cut answers before this text, such as "####"; null: whole answers.', None)
    task: str | None = option("Task of all rows; rewards choose their rows by it.", None)
    task_column: str | None = option("Column with the task of each row, instead of task.", None)
    system_prompt: str | None = option("System message put before every prompt.", None)
    limit: int | None = option("Number of rows to read; null: all.", None, at_least=1)
    start: int = option("Number of rows to skip first, so that one file gives training and validation.", 0, at_least=0)
    at_least: dict[str, float] | None = option(
        "Keep the rows read whose values are at least these, such as {average_test_score: 1}; null: all.", None
    )
    where: dict[str, str] | None = option(
        "Then keep rows with exactly these values, such as {FunctionalCategory: standard}; null: all.", None
    )
    holdout: float = option(
        "Share of the remaining rows that is held out, so that one file gives training and validation.",
        0.0,
        at_least=0,
        below=1,
    )
    holdout_by: str | None = option(
        "Column that stratifies the holdout: of each value's rows that share is held out; null: of all rows, at random.",
        None,
    )
    holdout_seed: int = option(
        "Which rows are held out; give both sides the same holdout, holdout_by and holdout_seed.", 1, at_least=0
    )
    held_out: bool = option("Take the rows that are held out instead of the others.", False)
    sample: int | None = option("Number of rows to draw at random from those that remain; null: all.", None, at_least=1)
    sample_seed: int = option("Seed of that draw, which is the same in every process and run.", 1)
    streaming: bool = option(
        "Download no more than limit needs; every process downloads its own rows and keeps no copy on disk.", False
    )


@dataclass
class DataConfig:
    train: list[SourceConfig] = option("List of sources; their rows are joined.", example="[{path: prompts.jsonl}]")
    validation: list[SourceConfig] = option("List of sources like those of train, held out.", list)
    max_prompt_tokens: int = option("Longest prompt in tokens; longer ones are dropped and counted.", 1024, at_least=1)
    shuffle: bool = option("Draw rows in a new random order every epoch.", True)


@dataclass
class SFTDataConfig(DataConfig):
    sequences_per_step: int = option("Examples per optimizer step, over all ranks.", at_least=1, example="32")
    max_tokens: int = option(
        "Longest example in tokens, prompt and completion; longer and unanswered ones are dropped.", 2048, at_least=1
    )


@dataclass
class EngineConfig:
    """Configure the colocated vLLM engines, and how they sample."""

    temperature: float = option(
        "Temperature of sampling, and of the log-probs in training; below 0.01, vLLM samples at 0.01.",
        1.0,
        at_least=0.01,
    )
    top_p: float = option(
        "Sample from the likeliest tokens with this total probability; 1: from all.", 1.0, above=0, at_most=1
    )
    top_k: int = option("Sample from this many likeliest tokens; -1: from all.", -1, at_least=1, also=-1)
    mask_replay: bool = option(
        "Take log-probs, ratios and KL over the tokens that top_p and top_k kept when vLLM sampled, instead of over all.",
        False,
    )
    routing_replay: bool = option(
        "For a mixture of experts: train with the experts that vLLM chose for each token, instead of those of the trainer.",
        False,
    )
    stop_tokens: list[str] = option(
        "Tokens that end a response, such as [<|eom_id|>], in addition to EOS and those of the template and of "
        "generation_config.json.",
        list,
    )
    think_end_token: str | None = option(
        "Text that ends a model's thoughts, such as </think>: rewards and judges read what follows it; null: whole responses.",
        None,
    )
    tensor_model_parallel_size: int = option(
        "Ranks of each vLLM engine; all ranks are divided into engines.", 1, at_least=1, may_change=True
    )
    gpu_memory_utilization: float = option(
        "Share of GPU memory that vLLM may use while it generates.", 0.6, above=0, at_most=1, may_change=True
    )
    max_num_seqs: int = option("Most sequences that one engine decodes together.", 256, at_least=1, may_change=True)
    enforce_eager: bool | None = option(
        "Don't use CUDA graphs (on a CPU: don't compile vLLM's model): starts sooner, generates more slowly; null: CUDA graphs "
        "on a GPU; on a CPU recipes/frpo.py compiles a dense model if the run is long enough.",
        None,
        may_change=True,
    )
    refit_bucket_mb: int = option("MiB of weights in transfer to vLLM at one time.", 512, at_least=1, may_change=True)
    logprob_gap_threshold: float | None = option(
        "Largest mean |log-prob of the trainer - log-prob of vLLM|, in nats; null: set by the first rollout.",
        None,
        above=0,
        also=float("inf"),
        may_change=True,
    )


@dataclass
class RolloutConfig(EngineConfig):
    prompts_per_step: int = option("Prompts per step, over all ranks.", at_least=1, example="16")
    group_size: int = option("Responses per prompt, compared with each other.", 8, at_least=2)
    max_response_tokens: int = option(
        "Longest response in tokens; longer ones are cut and counted.", at_least=1, example="2048"
    )
    truncated: str = option(
        "Responses cut at max_response_tokens: like others (keep), compared with none (mask), of reward 0 at most (zero).",
        "keep",
        choices=("keep", "mask", "zero"),
    )
    token_gap_limit: float | None = option(
        "Leave tokens out of the loss whose log-probs of trainer and vLLM differ by more nats than this; null: none.",
        4.0,
        above=0,
    )
    importance_correction: str = option(
        "Weigh by the ratio of the trainer's probability to vLLM's: of each token, the product or geometric mean of the "
        "sequence's.",
        "none",
        choices=("none", "token", "sequence", "geometric"),
    )
    importance_limit: float = option("Largest ratio of importance_correction.", 2.0, above=0, also=float("inf"))
    importance_floor: float = option("Smallest ratio of importance_correction.", 0.0, at_least=0)
    importance_outside: str = option(
        "What a ratio beyond importance_limit or importance_floor counts: that bound (truncate), or 0 (mask).",
        "truncate",
        choices=("truncate", "mask"),
    )


@dataclass
class RewardConfig:
    target: str = option(
        "Function that scores: math, code, exact, format, one_boxed, regex, length, judge, chat_judge, "
        "moderation, reward_model, safety, package.function or file.py:function.",
        example="math",
    )
    weight: float = option("Factor in the sum of all rewards of a response.", 1.0)
    tasks: list[str] | None = option("List of the tasks that it scores; null: all.", None)
    args: dict[str, Any] = option("Keyword arguments of the function.", dict)
    timeout: float = option(
        "Seconds per response, when isolated, after which it counts as unscored.", 10.0, above=0, may_change=True
    )
    isolate: bool = option("Run in separate processes, which may hang or die.", False, may_change=True)
    workers: int = option("Number of those processes on each rank.", 2, at_least=1, may_change=True)


@dataclass
class ProbeConfig:
    interval: int = option("Steps between probes, which also come first and last; 0: none.", 0, at_least=0)
    prompts: list[SourceConfig] = option(
        "List of sources like those of data.train: prompts of the earlier stage, held out.", list
    )
    reward: dict[str, RewardConfig] = option("Mapping like reward: the rewards of the earlier stage.", dict)
    samples: int = option("Responses to each prompt, with the sampling options of rollout.", 1, at_least=1)
    max_response_tokens: int = option("Longest response in tokens.", 2048, at_least=1)


@dataclass
class TrainerConfig:
    num_nodes: int = option("Machines.", 1, at_least=1, may_change=True)
    devices: int = option(
        "Processes on each machine, one per GPU; torchrun or srun must start as many.", 1, at_least=1, may_change=True
    )
    max_steps: int = option(
        "Steps in all; in recipes/frpo.py a step is one rollout and its updates.",
        at_least=1,
        example="500",
        may_change=True,
    )
    seed: int = option("Seed of the order of data and of sampling.", 1, at_least=0)
    microbatch_tokens: int = option(
        "Tokens in a packed microbatch; at least the longest sequence.", 8192, at_least=1, may_change=True
    )
    val_interval: int = option(
        "Steps between validations, which also come first and last; 0: none.", 0, at_least=0, may_change=True
    )
    save_interval: int = option("Steps between checkpoints; 0: only at the end.", 0, at_least=0, may_change=True)
    phase_timeout: float = option(
        "Seconds that one phase of a step may take before the job is stopped.", 1800.0, above=0, may_change=True
    )


@dataclass
class FRPOTrainerConfig(TrainerConfig):
    updates_per_rollout: int = option("Optimizer steps per rollout, each on its share of the groups.", 1, at_least=1)
    reference_interval: int | None = option(
        "Update the reference from the policy every this many steps (reference_mix); null: it stays the initial policy.",
        None,
        at_least=1,
    )
    reference_mix: float = option(
        "Weight of the policy in that update; 1: it replaces the reference; below 1: a moving average.",
        1.0,
        above=0,
        at_most=1,
    )


@dataclass
class CheckpointConfig:
    keep_last: int = option("Number of newest checkpoints to keep.", 2, at_least=1, may_change=True)
    keep_best: bool = option(
        "Keep the checkpoint with the best validation as well: the highest reward, in recipes/sft.py the lowest loss.",
        True,
        may_change=True,
    )
    resume: str = option(
        "Where a new run begins: auto (step 1), or a checkpoint's path; never: refuse a run_dir that would be continued.",
        "auto",
        may_change=True,
    )


@dataclass
class LoggingConfig:
    tensorboard: bool = option("Write TensorBoard events to run_dir.", True, may_change=True)
    wandb_project: str | None = option(
        "Weights & Biases project; null: not used. Needs `wandb login`, or WANDB_MODE=offline.", None, may_change=True
    )
    wandb_name: str | None = option("Weights & Biases name of the run; null: W&B makes one.", None, may_change=True)


# Fields of both recipes, in the order in which a user meets them.
_run_dir = partial(
    option,
    "Directory for checkpoints, metrics and the model; continued if it exists. In paths, ~ is home.",
    example="runs/first",
    may_change=True,
)
_optim = partial(option, "AdamW.", OptimizerConfig)
_probe = partial(
    option, "Measure the skill of an earlier stage during this one, without changing the training.", ProbeConfig
)
_checkpoint = partial(option, "Which checkpoints to keep, and where a run begins.", CheckpointConfig)
_logging = partial(option, "Where metrics go, in addition to run_dir/metrics.jsonl.", LoggingConfig)


@dataclass
class FRPORun:
    """recipes/frpo.py"""

    run_dir: str = _run_dir()
    model: ModelConfig = option("The policy, and how it is split over ranks.", ModelConfig)
    objective: Any = option(
        "What is optimized: name (frpo, grpo, dr_grpo) or _target_ (package.Class), and its own options (docs/options.md).",
        example="frpo",
    )
    optim: OptimizerConfig = _optim()
    data: DataConfig = option("Prompts.", DataConfig)
    rollout: RolloutConfig = option("How responses are sampled, by vLLM in the processes of the run.", RolloutConfig)
    reward: dict[str, RewardConfig] = option("Mapping from names of your choice to rewards.", example="gsm8k")
    probe: ProbeConfig = _probe()
    trainer: FRPOTrainerConfig = option("Steps and processes.", FRPOTrainerConfig)
    checkpoint: CheckpointConfig = _checkpoint()
    logging: LoggingConfig = _logging()


@dataclass
class SFTRun:
    """recipes/sft.py"""

    run_dir: str = _run_dir()
    model: ModelConfig = option("The model, and how it is split over ranks.", ModelConfig)
    optim: OptimizerConfig = _optim()
    data: SFTDataConfig = option("Prompts and completions.", SFTDataConfig)
    rollout: EngineConfig = option("How the responses of probes are sampled.", EngineConfig)
    probe: ProbeConfig = _probe()
    trainer: TrainerConfig = option("Steps and processes.", TrainerConfig)
    checkpoint: CheckpointConfig = _checkpoint()
    logging: LoggingConfig = _logging()


TrainingRun = FRPORun | SFTRun
