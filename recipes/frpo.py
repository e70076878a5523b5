"""Train a policy with FRPO, or a GRPO baseline.

    torchrun --nproc_per_node 2 recipes/frpo.py --config-name experiment/demo
    python recipes/frpo.py model.path=... data.train='[{path: prompts.jsonl}]' ...    # options: docs/options.md

A mistake in the configuration is told before anything heavy is imported, so nothing is imported above `__main__`.
"""


def run(cfg) -> bool:
    from frpo_nemo.training.frpo import train

    return train(cfg)


if __name__ == "__main__":
    from frpo_nemo.config.cli import main
    from frpo_nemo.config.options import FRPORun
    from frpo_nemo.training.checks.config import validate_frpo

    main(run, FRPORun, "frpo", validate_frpo)
