"""Adapters into vLLM: merged into the weights, as a refit sends them, against vLLM's own LoRA, which takes only the adapter.

    python -m benchmarks.adapter_refit merged
    python -m benchmarks.adapter_refit lora

Both sample the same 128 responses with a Llama of 8 layers, width 512, and adapters of rank 64 on all matrices. Printed are
the seconds until new adapters are there and those of sampling with them; the first sampling includes what is compiled.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
RANK, PROMPTS, SAMPLES, TOKENS = 64, 16, 8, 64


def make(directory: Path) -> tuple[str, str]:
    """Return (a random model, a random adapter for it)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, vocab_size=4096)
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory / "model")
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    peft.save_pretrained(directory / "adapter")
    peft.merge_and_unload().save_pretrained(directory / "merged")
    return str(directory / "model"), str(directory / "adapter")


def main(way: str) -> None:
    os.environ |= SETTINGS
    with tempfile.TemporaryDirectory() as name:
        model, adapter = make(Path(name))
        from safetensors.torch import load_file
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        options = dict(enable_lora=True, max_lora_rank=RANK, max_loras=1) if way == "lora" else {}
        llm = LLM(
            model,
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=256,
            max_num_seqs=128,
            enforce_eager=True,
            **options,
        )
        params = SamplingParams(n=SAMPLES, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0, seed=1)
        requests = [{"prompt_token_ids": [3 + i] * 16} for i in range(PROMPTS)]
        merged = load_file(f"{name}/merged/model.safetensors")
        for number in (1, 2):
            started, chosen = time.monotonic(), {}
            if way == "lora":
                chosen["lora_request"] = LoRARequest(f"step{number}", number, adapter)
                llm.llm_engine.add_lora(chosen["lora_request"])
            else:
                llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(list(merged.items()))})
            refitted = time.monotonic()
            outputs = llm.generate(requests, params, use_tqdm=False, **chosen)
            seconds = time.monotonic() - refitted
            tokens = sum(len(response.token_ids) for output in outputs for response in output.outputs)
            print(f"{way}: refit {refitted - started:.3f} s, {tokens} tokens in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
