"""Makes small random models and tokenizers, in Hugging Face format, for examples and tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from frpo_nemo.errors import ConfigError

FAMILIES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "mixtral": "MixtralConfig",
}
HEADS = {"lm": "AutoModelForCausalLM", "reward": "AutoModelForSequenceClassification"}
BOS, EOS, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def new_model(
    out_path: str | Path,
    *,
    tokenizer,
    family: str = "llama",
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_hidden_size: int,
    max_position_embeddings: int = 1024,
    num_experts: int = 8,
    experts_per_token: int = 2,
    tie: bool = False,
    head: str = "lm",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a randomly initialised model of `family` and its tokenizer to `out_path` (safetensors). head: lm, a language
    model, or reward, one number per sequence. The seed decides every weight; torch's global generator stays as it was.
    Raises ConfigError on an unknown family or head, sizes that do not divide, or a tokenizer that transformers does
    not load for this family."""
    import transformers

    for name, value, known in (("family", family, FAMILIES), ("head", head, HEADS)):
        if value not in known:
            raise ConfigError(f"{name}={value} must be one of {', '.join(known)}")
    if hidden_size % num_heads or num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads={num_heads} must divide hidden_size={hidden_size}, "
            f"and num_kv_heads={num_kv_heads} must divide num_heads"
        )
    experts: dict[str, int | bool] = {}
    if family in ("qwen3_moe", "mixtral"):  # num_local_experts: transformers' name in both
        experts = dict(num_local_experts=num_experts, num_experts_per_tok=experts_per_token)
        experts |= dict(moe_intermediate_size=ffn_hidden_size, norm_topk_prob=True) if family == "qwen3_moe" else {}
    config = getattr(transformers, FAMILIES[family])(
        **experts,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=ffn_hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if head == "reward":
        config.num_labels = 1
    if family == "mistral":
        config.sliding_window = None  # the default is that of Mistral's 7B model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, HEADS[head]).from_config(config, dtype=dtype)
    model.save_pretrained(out_path)
    tokenizer.save_pretrained(out_path)
    _check_tokenizer_survives(out_path, tokenizer, family)


def train_tokenizer(texts: Iterable[str], vocab_size: int):
    """Return a byte-level BPE tokenizer of at most `vocab_size` tokens, trained on `texts`: any text encodes and decodes
    back (in Unicode's NFC). Its chat template writes `<|bos|><|user|>` ... `<|assistant|>`, each role on a separate
    line. Normaliser and pre-tokenizer are Qwen2's, because transformers puts those into the tokenizer of any qwen2 model,
    whatever its files say; they also split numbers into digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [BOS, EOS, PAD, *ROLES]
    if vocab_size < len(alphabet) + len(special):
        raise ConfigError(
            f"vocab_size={vocab_size} is too small: {len(alphabet)} bytes and {len(special)} special tokens come first"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _check_tokenizer_survives(path: str | Path, tokenizer, family: str) -> None:
    """Check that transformers loads the tokenizer unchanged. AutoTokenizer chooses a class by model family, and some
    classes rebuild their parts instead of reading them."""
    from transformers import AutoTokenizer

    sample = tokenizer.decode(list(range(len(tokenizer))))
    loaded = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if loaded.encode(sample) != tokenizer.encode(sample) or loaded.decode(loaded.encode(sample)) != sample:
        raise ConfigError(
            f"transformers loads the tokenizer of a {family} model as "
            f"{type(loaded).__name__}, which does not read this one: take another of {', '.join(FAMILIES)}"
        )
