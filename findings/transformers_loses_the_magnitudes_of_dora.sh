#!/usr/bin/env bash
# transformers 5.20.2 does not read the magnitude vectors of a DoRA adapter (peft's use_dora). from_pretrained of the adapter's
# directory reports lora_magnitude_vector.default.weight as missing and lora_magnitude_vector.default as unexpected, only logs
# this, and goes on with vectors that were not trained. peft itself, PeftModel.from_pretrained on the base model, reads the
# same files in full: it leaves the adapter's name and ".weight" out of the names in the file and puts both back, and
# transformers puts back the first alone.
#
# Seen with transformers 5.20.2, peft 0.21.2, torch 2.13.0 (CPU), Python 3.11. Source: transformers/integrations/peft.py,
# load_adapter; peft/utils/save_and_load.py, get_peft_model_state_dict.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install -q torch==2.13.0+cpu ||
  "$work/env/bin/pip" install -q torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu
"$work/env/bin/pip" install -q transformers==5.20.2 peft==0.21.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/env/bin/python" - <<'P'
import logging, sys
import torch

logging.disable(logging.WARNING)
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1)
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("base")
trained = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(target_modules=["q_proj"], use_dora=True))
for name, parameter in trained.named_parameters():
    if "lora" in name:
        parameter.data += 0.5 * torch.rand_like(parameter)
trained.save_pretrained("adapter")

ids = torch.arange(9)[None]
with torch.no_grad():
    expected = trained.eval()(ids).logits
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()(ids).logits
    model, report = AutoModelForCausalLM.from_pretrained("adapter", output_loading_info=True)
    by_transformers = model.eval()(ids).logits
missing = sorted(report["missing_keys"])
gaps = [(logits - expected).abs().max().item() for logits in (by_peft, by_transformers)]
print("missing, says transformers:   ", missing, "unexpected:", sorted(report["unexpected_keys"]))
print("largest difference of logits:  peft %.1e, transformers %.1e" % tuple(gaps))
sys.exit(0 if any("lora_magnitude_vector" in name for name in missing) and gaps[0] < 1e-5 < 1e-3 < gaps[1] else 1)
P
