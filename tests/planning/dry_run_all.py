"""Every known model at a layout of its own, and the jobs' experiments, each pipeline stage, printed as JSON: a process of
its own, because the fake process group and the meta device are no company for other tests."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from known_models import MODELS, write_config

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun, LoRAConfig, ModelConfig, SFTRun
from frpo_nemo.planning.dry_run import dry_run
from frpo_nemo.planning.memory import Layout
from frpo_nemo.training.checks.resources import layout_of

# name -> TP, PP, DP[, layers of the first stage, of the last]
LAYOUTS = {
    "Mistral-7B-Instruct-v0.1": (4, 1, 2),
    "Qwen2.5-0.5B-Instruct": (2, 2, 2),  # tied: the last stage has a copy
    "Qwen2.5-7B-Instruct": (4, 2, 1),
    "Qwen2.5-14B-Instruct": (4, 2, 2),
    "Qwen2.5-32B-Instruct": (8, 2, 2),
    "Qwen2.5-72B-Instruct": (8, 4, 2),
    "Qwen3-8B": (2, 4, 1, 8, 8),
    "Llama-3.1-8B-Instruct": (8, 3, 1, 12, None),
    "Llama-3.1-70B-Instruct": (8, 4, 2, None, 17),
    "Qwen3-30B-A3B-Instruct-2507": (1, 1, 16),
    "Qwen3-235B-A22B": (4, 2, 8),
    "Mixtral-8x7B-Instruct-v0.1": (2, 1, 8),
}
EXPERT_PARALLEL = {"Qwen3-30B-A3B-Instruct-2507": 8, "Qwen3-235B-A22B": 16, "Mixtral-8x7B-Instruct-v0.1": 8}
EXPERIMENTS = ("frpo_7b", "frpo_70b", "sft_7b", "sft_70b", "frpo_30b_a3b")  # of slurm/*.sh, in their own layouts
ADAPTERS = {"Mistral-7B-Instruct-v0.1": 64, "Llama-3.1-70B-Instruct": 64}  # name -> rank; the others have none


def main() -> None:
    assert LAYOUTS.keys() == MODELS.keys()
    with tempfile.TemporaryDirectory() as directory:
        for name, (tp, pp, dp, *uneven) in LAYOUTS.items():
            first, last = uneven or (None, None)
            path = str(write_config(name, Path(directory)))
            model = ModelConfig(
                path=path,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                sequence_parallel=tp > 1,
                num_layers_in_first_pipeline_stage=first,
                num_layers_in_last_pipeline_stage=last,
                expert_model_parallel_size=(ep := EXPERT_PARALLEL.get(name, 1)),
                lora=LoRAConfig(rank=ADAPTERS.get(name, 0)),
            )
            layout = Layout(tp=tp, pp=pp, dp=dp, ep=ep, first=first, last=last, lora_rank=model.lora.rank)
            stages = dry_run(model, layout)
            report(name, stages)
        for name in EXPERIMENTS:
            composed = compose(f"experiment/{name}", ["run_dir=run"])
            cfg = load(FRPORun if "objective" in composed else SFTRun, composed)
            cfg.model.path = str(write_config(cfg.model.path.rpartition("/")[2], Path(directory)))
            cfg.trainer.num_nodes, cfg.trainer.devices = {"70b": 8, "a3b": 2}.get(name[-3:], 1), 8
            report(name, dry_run(cfg.model, layout_of(cfg, cfg.trainer.num_nodes * 8, gpu=True)))


def report(name: str, stages: list) -> None:
    rows = [(len(stage.layers), stage.bytes, stage.estimate) for stage in stages]
    print(json.dumps({"name": name, "stages": rows}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
