"""Train a policy with FRPO, or a GRPO baseline.

    torchrun --nproc_per_node 2 recipes/frpo.py --config-name experiment/demo
    python recipes/frpo.py model.path=... data.train='[{path: prompts.jsonl}]' ...    # options: docs/options.md

A mistake in the configuration is reported before heavy imports, so this file imports nothing above `__main__`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frpo_nemo.config.options import FRPORun


def run(cfg: FRPORun) -> bool:
    from frpo_nemo.training.frpo import train

    return train(cfg)


if __name__ == "__main__":
    from frpo_nemo.config.cli import main
    from frpo_nemo.config.options import FRPORun
    from frpo_nemo.training.checks.config import validate_frpo

    main(run, FRPORun, "frpo", validate_frpo)
