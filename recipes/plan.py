"""Which parallel layout for which model on which GPUs? Does a configuration's layout build? How long will it run? None
of this needs a GPU.

    python recipes/plan.py model.path=meta-llama/Llama-3.1-70B-Instruct cluster=h100 cluster.num_nodes=8
    python recipes/plan.py --dry-run --config-name experiment/gsm8k_frpo parallel=tp2_pp2
    python recipes/plan.py --hours --config-name experiment/safety_mistral_7b objective.lambda_=0.5 workload.response_tokens=300

The first lists the layouts that fit, best first (options: --help, docs/options.md). The second builds the model of every rank
of a training configuration without memory, and checks its names, shapes and sizes. The third estimates the GPU hours of
a training configuration; of the first's options it takes cluster, workload.prompt_tokens and workload.response_tokens.
docs/planning.md explains all three.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path


def search() -> None:
    from rich.console import Console

    from frpo_nemo.config.cli import from_command_line
    from frpo_nemo.planning.plan import PlanRun, plan

    cfg = from_command_line(PlanRun, "plan")
    cfg.model.path = directory_with_config(cfg.model.path)
    plan(cfg, Console(width=max(Console().width, 132)))


def hours_of_config() -> None:
    from frpo_nemo.config.cli import compose
    from frpo_nemo.config.load import load
    from frpo_nemo.planning.plan import PlanRun, print_hours
    from frpo_nemo.training.checks.resources import step_of

    ours = [argument for argument in sys.argv if argument.startswith(("cluster", "workload."))]
    sys.argv = [argument for argument in sys.argv if argument not in ours]
    cfg = training_config()
    machines = [f"cluster.num_nodes={cfg.trainer.num_nodes}", f"cluster.gpus_per_node={cfg.trainer.devices}"]
    asked = load(PlanRun, compose("plan", [*ours, *machines, f"model.path={cfg.model.path}"]))
    layout, work = step_of(cfg, asked.workload)
    print_hours(asked, layout, work, cfg.trainer.max_steps)


def dry_run_of_config() -> None:
    from frpo_nemo.errors import ConfigError
    from frpo_nemo.training.checks.resources import layout_of

    cfg = training_config()
    layout = layout_of(cfg, cfg.trainer.num_nodes * cfg.trainer.devices, gpu=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the meta device is enough, and megatron-core would use a GPU
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns about packages that it does without
        from frpo_nemo.planning.dry_run import dry_run
        from frpo_nemo.planning.report import print_dry_run

        try:
            stages = dry_run(cfg.model, layout)
        except ConfigError:
            raise
        except ValueError as error:  # the built model differs from the table of weights or the arithmetic
            sys.exit(f"plan.py: {error}")
    print_dry_run(layout, stages)


def training_config():
    from frpo_nemo.config.cli import from_command_line
    from frpo_nemo.config.options import FRPORun, SFTRun

    sys.argv.append("run_dir=none")  # experiments leave it to the user, and nothing is written
    cfg = from_command_line(lambda composed: FRPORun if "objective" in composed else SFTRun, "frpo")
    cfg.model.path = directory_with_config(cfg.model.path)
    return cfg


def directory_with_config(path: str) -> str:
    from frpo_nemo.config.hub import CONFIG_ONLY, is_hub_name, local_model

    return local_model(path, download=True, files=CONFIG_ONLY) if is_hub_name(path) else path


def main() -> None:
    from frpo_nemo.errors import ConfigError

    ways = {"--dry-run": dry_run_of_config, "--hours": hours_of_config}
    chosen = [ways[argument] for argument in sys.argv if argument in ways]
    sys.argv = [argument for argument in sys.argv if argument not in ways]
    try:
        (chosen or [search])[0]()
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
