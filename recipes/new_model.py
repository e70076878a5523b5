"""Make a small random model with a tokenizer, to pre-train with recipes/sft.py, or to stand in for a reward model.

    python recipes/new_model.py out=runs/demo/base source=toy hidden_size=64 num_layers=2 num_heads=2
    python recipes/new_model.py out=runs/gsm8k/base source=train.jsonl columns=[question,answer]
        vocab_size=2048 hidden_size=128 num_layers=4 num_heads=4 ffn_hidden_size=320   (one line)

`source=toy` takes the fixed tokenizer of the toy task; any other source trains one on its `columns`.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from frpo_nemo.config.options import SourceConfig
from frpo_nemo.data.sources import load_rows
from frpo_nemo.errors import ConfigError
from frpo_nemo.examples.new_model import new_model, train_tokenizer
from frpo_nemo.examples.toy import toy_tokenizer


@dataclass
class NewModel:
    out: str = MISSING  # directory to write
    source: str = MISSING  # "toy", or the texts of the tokenizer: a file or a hub name
    columns: list[str] = field(default_factory=list)  # whose texts to train on
    vocab_size: int = 1024
    family: str = "llama"  # llama, mistral, qwen2, qwen3; with experts: qwen3_moe, mixtral
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING  # vLLM's CPU attention needs hidden_size / num_heads >= 32
    num_kv_heads: int | None = None  # None: num_heads
    ffn_hidden_size: int | None = None  # None: 4 * hidden_size
    num_experts: int = 8  # of families with experts, each of ffn_hidden_size
    experts_per_token: int = 2
    max_position_embeddings: int = 1024
    tie: bool = False
    head: str = "lm"  # lm, a language model, or reward, one number per sequence
    seed: int = 0


def make_tokenizer(config: NewModel):
    if config.source.partition(":")[0] == "toy":
        return toy_tokenizer()
    if not config.columns:
        raise ConfigError(f"columns=[...] must name the text columns of {config.source}")
    texts = []
    for column in config.columns:
        texts += [str(row[column]) for row in load_rows(SourceConfig(path=config.source, prompt=column))]
    return train_tokenizer(texts, config.vocab_size)


def main() -> None:
    try:
        config: NewModel = OmegaConf.to_object(OmegaConf.merge(NewModel, OmegaConf.from_cli()))
        out = Path(config.out)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"out={config.out} exists and is not empty; choose another directory, or remove it.")
        temporary = out.with_name(out.name + ".incomplete")
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer = make_tokenizer(config)
        new_model(
            temporary,
            tokenizer=tokenizer,
            family=config.family,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads or config.num_heads,
            ffn_hidden_size=config.ffn_hidden_size or 4 * config.hidden_size,
            max_position_embeddings=config.max_position_embeddings,
            tie=config.tie,
            head=config.head,
            seed=config.seed,
        )
        temporary.rename(out)
    except (ConfigError, OmegaConfBaseException) as problem:
        sys.exit(f"{problem}")
    print(f"{config.out}: a random {config.family} model, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
