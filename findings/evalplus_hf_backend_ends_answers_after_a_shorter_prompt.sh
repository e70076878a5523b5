#!/usr/bin/env bash
# evalplus 0.3.1 with --backend hf ends an answer after its first token when an earlier problem had a shorter prompt. For
# each prompt it replaces model._get_stopping_criteria by a function that calls the former one and adds a criterion, so
# the criteria of all earlier prompts stay. A criterion looks for stop strings behind the first N tokens, N being the
# length of its own prompt: in a longer prompt it finds the prompt's "\n```\n". In a benchmark of many problems all but
# the first and the shortest are lost, without an error.
#
# Seen with evalplus 0.3.1, stop-sequencer 1.2.3, transformers 5.20.2, torch 2.13.0, Python 3.11; a model that writes x
# for ever. Source: evalplus/provider/hf.py (codegen), stop_sequencer/stop_sequencer.py (register_stop_texts).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
pip() { "$work/env/bin/pip" -q -q --disable-pip-version-check install "$@"; }
pip torch==2.13.0+cpu 2>/dev/null || pip torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
pip "setuptools<81"
pip --no-build-isolation evalplus==0.3.1 stop-sequencer==1.2.3
pip transformers==5.20.2 accelerate
cd "$work"
HF_HUB_OFFLINE=1 XDG_CACHE_HOME=$work/cache "$work/env/bin/python" - <<'P'
import contextlib, io, logging, string, sys

logging.disable(logging.WARNING)
import torch
from evalplus.provider.hf import HuggingFaceDecoder
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = {token: index for index, token in enumerate(("<eos>", *string.printable))}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
tokenizer.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
tokenizer.save_pretrained("model")
shape = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), bos_token_id=None, eos_token_id=0, **shape))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        parameter.fill_(0.0 if "proj" in name or "lm_head" in name else 1.0)
    model.lm_head.weight[letters["x"]] = 1
model.save_pretrained("model")

own = dict(dtype="float32", temperature=0, max_new_tokens=20, instruction_prefix="Solve:", response_prefix="Solution:")
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    decoder = HuggingFaceDecoder("model", "humaneval", **own)
found = []
for letters_of_prompt in (60, 10, 60):
    answer = decoder.codegen("y" * letters_of_prompt, do_sample=False, num_samples=1)[0]
    found.append(len(answer))
    print(f"a problem of {letters_of_prompt} letters: an answer of {len(answer)} tokens")
sys.exit(0 if found == [20, 20, 1] else 1)
P
