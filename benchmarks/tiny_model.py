"""The model and prompts of the comparison with TRL: a small random Qwen2 in fp32, one token per character.

Every response must run to its full length, or the two sides would be timed on different work. Settings for that
differ between libraries, so the model itself does it: channel 0 of the residual stream is 1 everywhere, no layer
writes to it, and the output row of <eos> reads that channel only. The probability of <eos> is then exactly 0 in
fp32, and so is its gradient. With --end it is about that at every token instead, and responses are ragged. Needs only torch,
transformers and tokenizers, so either environment can run it.
"""

import argparse
import json
import math
import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PAD, EOS, UNKNOWN = 0, 1, 2
PROMPT_TOKENS = 16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character. The chat template adds nothing: a prompt as a chat (our side) and as
    plain text (TRL's) has the same tokens."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN}
    for character in string.printable:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template="{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}",
    )


def make_model(end: float = 0.0) -> Qwen2ForCausalLM:
    """Return the model. end: probability of <eos> at every token."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS] = 0.0
        # Times about 10 after the last norm: exp(-1000) is 0. All other logits are near 0.
        model.lm_head.weight[EOS, 0] = math.log(127 * end / (1 - end)) / 10 if end else -100.0
    return model


def make_prompts(count: int) -> list[str]:
    """Return distinct prompts of PROMPT_TOKENS tokens each."""
    return [f"question {number:06d}:" for number in range(count)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path, help="gets model/ and prompts.jsonl")
    parser.add_argument("--prompts", type=int, default=4096)
    parser.add_argument("--end", type=float, default=0.0, help="probability of <eos> at every token")
    arguments = parser.parse_args()
    make_model(arguments.end).save_pretrained(arguments.directory / "model")
    make_tokenizer().save_pretrained(arguments.directory / "model")
    lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in make_prompts(arguments.prompts)]
    (arguments.directory / "prompts.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
