#!/usr/bin/env bash
# evalplus 0.3.1 renders the chat template as text, which with Llama 3's begins with the begin-of-text token, and then
# tokenizes that text with special tokens: the model reads the token twice. Its hf backend calls tokenizer.encode(prompt);
# its vllm backend gives the text to LLM.generate, which adds special tokens to text as well (vLLM 0.32). lm-eval looks
# for the token at the beginning of the text, and adds none.
#
# Seen with evalplus 0.3.1, transformers 5.20.2, Python 3.11. Source: evalplus/provider/hf.py (codegen), utility.py
# (make_raw_chat_prompt); vllm/renderers/base.py (default_cmpl_tok_params).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q -q --disable-pip-version-check install "setuptools<81" wheel
"$work/env/bin/pip" -q -q --disable-pip-version-check install --no-build-isolation evalplus==0.3.1
"$work/env/bin/pip" -q -q --disable-pip-version-check install transformers==5.20.2 jinja2
cd "$work"
HF_HUB_OFFLINE=1 XDG_CACHE_HOME=$work/cache "$work/env/bin/python" - <<'P'
import logging, string, sys

logging.disable(logging.WARNING)
from evalplus.provider.utility import make_raw_chat_prompt
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

letters = {token: index for index, token in enumerate(("<bos>", "<eos>", *string.printable))}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
tokenizer.chat_template = "<bos>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"

prompt = make_raw_chat_prompt("def f(x):\n", "Solve:", "Solution:", tokenizer)
read = tokenizer.convert_ids_to_tokens(tokenizer.encode(prompt))  # the two lines of evalplus's codegen
messages = [{"role": "user", "content": "Solve:"}]
right = tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(messages, return_dict=False))
print("evalplus's prompt:   ", read[:8])
print("apply_chat_template: ", right[:8])
sys.exit(0 if read[:3] == ["<bos>", "<bos>", "u"] and right[:2] == ["<bos>", "u"] else 1)
P
