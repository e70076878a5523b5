"""Supervised fine-tuning on prompt/completion data.

    torchrun --nproc_per_node 2 recipes/sft.py --config-name experiment/gsm8k_sft
    python recipes/sft.py model.path=... data.train='[{path: rows.jsonl, completion: answer}]' ...   # options: docs/options.md

A mistake in the configuration is reported before heavy imports, so this file imports nothing above `__main__`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frpo_nemo.config.options import SFTRun


def run(cfg: SFTRun) -> bool:
    from frpo_nemo.training.sft import train

    return train(cfg)


if __name__ == "__main__":
    from frpo_nemo.config.cli import main
    from frpo_nemo.config.options import SFTRun
    from frpo_nemo.training.checks.config import validate_sft

    main(run, SFTRun, "sft", validate_sft)
