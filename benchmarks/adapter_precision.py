"""Does it matter that the adapters of a bf16 model are multiplied in bf16, where PEFT keeps them in fp32?

    python -m benchmarks.adapter_precision runs/smol        # after make smol: its model, its trained adapters, its responses

The optimizer keeps its copy of adapters in fp32 either way, so what differs is the rounding of A and B and of their products.
Log-probs and FRPO's gradient are compared with those of the same weights computed in fp32 throughout.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from acceptance import batches
from acceptance.policy import make_actor
from frpo_nemo.config.options import LoRAConfig, ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.lora import Adapter, _wide
from frpo_nemo.megatron.weights.adapter_files import PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS
from frpo_nemo.megatron.weights.binding import bind_adapters
from frpo_nemo.megatron.weights.load import fill
from frpo_nemo.objective import build_objective
from frpo_nemo.processes import world

GROUPS = 40


class Fp32Adapter(Adapter):
    """Compute as PEFT does: input, A, B and their product in fp32; the sum with the layer's output is rounded."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.linear(x.float(), self.exact["a"])
        return torch.nn.functional.linear(hidden, _wide(self.exact["b"], self.member)) * self.scale


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    world.start_world()
    batch, loss = responses(run)
    exact = numbers(run, batch, loss, precision="fp32")
    print("| adapters | mean error of log-probs | relative error of the gradient |\n| --- | ---: | ---: |")
    for name, in_fp32 in (("bf16", False), ("fp32", True)):
        logprobs, gradient = numbers(run, batch, loss, precision="bf16", adapters_in_fp32=in_fp32)
        error = (logprobs - exact[0]).abs().mean().item()
        distance = ((gradient - exact[1]).norm() / exact[1].norm()).item()
        print(f"| {name} | {error:.4f} | {distance:.3f} |", flush=True)
    print(
        f"\n{len(exact[0])} response tokens of {batch.num_sequences} responses, {len(exact[1])} numbers in the adapters"
    )


def responses(run: Path) -> tuple[SequenceBatch, object]:
    """Return GROUPS groups of responses that the trained policy sampled, and FRPO's loss of them."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model", trust_remote_code=False)
    newest = max((run / "frpo/validation").glob("*.jsonl"))
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[: GROUPS * batches.GROUP_SIZE]
    rows = [next(row for row in rows if row["prompt"] == prompt) for prompt in prompts]
    texts = [
        [tokenizer(row[key], add_special_tokens=False)["input_ids"] for row in rows] for key in ("prompt", "response")
    ]
    generator = torch.Generator().manual_seed(0)
    batch = SequenceBatch.from_lists(
        *texts,
        group=torch.arange(len(rows)) // batches.GROUP_SIZE,
        reward=torch.rand(len(rows), generator=generator).double(),
    )
    return batch, batches.policy_loss(batch, build_objective({"name": "frpo", "lambda_": 0.5}))


def numbers(run: Path, batch: SequenceBatch, loss, *, precision: str, adapters_in_fp32: bool = False):
    """Return (log-probs [R], gradient of all A and B in fp32)."""
    settings = json.loads((run / "frpo/adapter" / PEFT_CONFIG).read_text())
    lora = LoRAConfig(rank=settings["r"], alpha=settings["lora_alpha"])
    model = ModelConfig(path=str(run / "model"), precision=precision, lora=lora)
    actor = make_actor(model, OptimizerConfig(lr=1e-5), microbatch_tokens=2048)
    trained = load_file(run / "frpo/adapter" / PEFT_WEIGHTS)
    bindings = bind_adapters(actor.gpt, actor.arch)
    for binding in bindings:
        tensors = [trained[PEFT_PREFIX + name] for name, _ in binding.weight.hugging_face]
        with torch.no_grad():
            fill(binding.parameter, binding.weight, 0, tensors)
    adapters = [module for module in actor.gpt.modules() if isinstance(module, Adapter)]
    if adapters_in_fp32:
        in_fp32(actor, bindings, trained)
    _, columns = actor.accumulate_gradient(batch, loss)
    if adapters_in_fp32:
        gradients = [adapter.exact[name].grad for adapter in adapters for name in ("a", "b")]
    else:
        gradients = [parameter.main_grad for adapter in adapters for parameter in (adapter.a, adapter.b)]
    return columns["logprobs"], torch.cat([gradient.float().flatten() for gradient in gradients])


def in_fp32(actor: PolicyActor, bindings, trained: dict[str, Tensor]) -> None:
    """Give every layer its adapter in fp32."""
    exact = {}
    for binding in bindings:
        exact[id(binding.parameter)] = torch.zeros(binding.parameter.shape)
        fill(
            exact[id(binding.parameter)],
            binding.weight,
            0,
            [trained[PEFT_PREFIX + n] for n, _ in binding.weight.hugging_face],
        )
    for layer in actor.gpt.modules():
        adapter = getattr(layer, "lora", None)
        if isinstance(adapter, Adapter):
            adapter.__class__ = Fp32Adapter
            adapter.exact = {name: exact[id(getattr(adapter, name))].requires_grad_() for name in ("a", "b")}
            layer.register_forward_hook(lambda module, inputs, out: (out[0].to(torch.bfloat16), *out[1:]))


if __name__ == "__main__":
    main()
