#!/usr/bin/env bash
# transformers 5.20.2 gives other token ids than tokenizer.json says, without an error, where tokenizer_config.json names
# LlamaTokenizerFast (as the byte-level tokenizer of DeepSeek-V3 does, whose files other models share) and
# config.json has model_type llama: LlamaTokenizer builds normaliser, pre-tokenizer and decoder of SentencePiece anew and
# takes the vocabulary alone from the file. The text does not decode back either: its spaces are gone.
#
# Seen with transformers 5.20.2, tokenizers as it asks for, Python 3.11; a byte-level BPE tokenizer trained on one line.
# PreTrainedTokenizerFast reads the same directory as the file stands. Source: transformers/models/llama/
# tokenization_llama.py, LlamaTokenizer.__init__.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q transformers==5.20.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'P'
import json, logging, sys
from pathlib import Path

logging.disable(logging.WARNING)
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

text = "two small words\n"
model = Path("model")
model.mkdir()
trained = ByteLevelBPETokenizer()
trained.train_from_iterator([text] * 9, vocab_size=300)
trained.save(str(model / "tokenizer.json"))
(model / "config.json").write_text(json.dumps({"model_type": "llama"}))
(model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizerFast"}))

file = Tokenizer.from_file("model/tokenizer.json").encode(text, add_special_tokens=False).ids
auto = AutoTokenizer.from_pretrained("model")
plain = PreTrainedTokenizerFast.from_pretrained("model")
found = auto.encode(text, add_special_tokens=False)
print("tokenizer.json:          ", file)
print(f"AutoTokenizer:           {found} ({type(auto).__name__}), decoded {auto.decode(found)!r}")
print("PreTrainedTokenizerFast: ", plain.encode(text, add_special_tokens=False))
sys.exit(0 if found != file and plain.encode(text, add_special_tokens=False) == file else 1)
P
