"""Random models of a few thousand parameters, one per supported family, in Hugging Face format: for tests.

Every parameter is random, also those that transformers initialises to 0 or 1 (biases, norms): a weight that is left
out or swapped must show. The vocabulary is odd, so that padding is exercised.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EXPERT_FAMILIES = ("qwen3_moe", "mixtral")

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)

_BASE = dict(
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)
_OWN = {
    "llama": dict(  # scaling that differs from megatron-core's fixed one, with short, middle and long waves
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=5000.0,
            factor=4.0,
            low_freq_factor=1.5,
            high_freq_factor=6.0,
            original_max_position_embeddings=64,
        )
    ),
    "mistral": dict(sliding_window=None, rms_norm_eps=1e-5),
    "qwen2": dict(rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3": dict(hidden_size=96),  # head_dim is not hidden_size / heads
    # vLLM's experts on a CPU need sizes that 32 divides.
    "qwen3_moe": dict(
        hidden_size=96, moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "mixtral": dict(hidden_size=96, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2),
}


def make_tiny(
    path: str | Path,
    family: str,
    *,
    layers: int = 4,
    vocab: int = 131,
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **config,
) -> str:
    """Write a random model with a character-level tokenizer (chat template included) to `path`; returns `path`.

    `config` overrides settings of the transformers config, e.g. num_key_value_heads=1.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_BASE, **_OWN[family], **config}
    hf_config = AutoConfig.for_model(
        family, vocab_size=vocab, num_hidden_layers=layers, tie_word_embeddings=tied, **settings
    )
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def tiny_tokenizer():
    """One token per printable character: 0 <pad>, 1 <eos>, 2 <unk>, then string.printable; 103 tokens.

    In a qwen2 directory, AutoTokenizer of transformers 5 ignores the saved class and loads a Qwen2Tokenizer, which
    drops spaces here; read it with PreTrainedTokenizerFast there.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(("<pad>", "<eos>", "<unk>", *string.printable))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices keep activations of order one; logits get a spread of about one; norms lie around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        elif parameter.dim() == 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)  # the last is the input, also of stacked experts
