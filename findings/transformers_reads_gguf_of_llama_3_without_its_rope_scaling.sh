#!/usr/bin/env bash
# transformers 5.20.2 loads a GGUF file of Llama 3.1 or later as another model, without an error: llama.cpp writes the
# scaling of the rotary embedding as the tensor rope_freqs.weight, transformers reads neither that nor a setting for it,
# and its config says rope_type default. Of a qwen3 file it ignores attention.key_length as well, and takes 128.
#
# Seen with transformers 5.20.2, gguf 0.19.0, torch 2.13.0 (CPU), Python 3.11; files with metadata and no weights of a
# model. Source: transformers/integrations/ggml.py, GGUF_CONFIG_MAPPING; modeling_gguf_pytorch_utils.py,
# load_gguf_checkpoint, which drops every tensor that the model has no parameter for.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q --find-links /opt/wheels transformers==5.20.2 gguf==0.19.0 torch==2.13.0+cpu \
  || "$work/env/bin/pip" install -q --extra-index-url https://download.pytorch.org/whl/cpu \
     transformers==5.20.2 gguf==0.19.0 torch==2.13.0+cpu
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'P'
import logging
import sys

logging.disable(logging.WARNING)
import numpy as np
from gguf import GGUFWriter
from transformers import AutoConfig


def config_of(architecture: str):
    writer = GGUFWriter(f"{architecture}.gguf", architecture)
    for add, value in (
        (writer.add_context_length, 131072), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_key_length, 64),
        (writer.add_rope_freq_base, 500000.0), (writer.add_vocab_size, 8),
    ):
        add(value)
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoConfig.from_pretrained(".", gguf_file=f"{architecture}.gguf")


llama, qwen3 = config_of("llama"), config_of("qwen3")
print("llama, factors of 1 to 8 in the file:", llama.rope_parameters)
print("qwen3, attention.key_length=64:       head_dim", qwen3.head_dim)
sys.exit(0 if llama.rope_parameters["rope_type"] == "default" and qwen3.head_dim == 128 else 1)
P
