"""Checks of hf_weights with real groups: every rank of a world calls them (see worlds.py)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file
from worlds import use_layout

from frpo_nemo.config.options import ModelConfig
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.cpu import megatron_device
from frpo_nemo.megatron.model import build_model, output_weight
from frpo_nemo.megatron.packing import build_microbatch
from frpo_nemo.megatron.weights.export import save_hf, stream_hf_weights
from frpo_nemo.megatron.weights.load import load_hf_weights
from frpo_nemo.processes import world


def check_logits_parity(path: str, tp: int, pp: int, sp: bool = False, **layout) -> float:
    """The imported model's logits on packed sequences equal transformers' within 1e-5 (fp32). Returns the largest
    difference on the last stage, 0 elsewhere. `layout`: further fields of ModelConfig."""
    sequences = [list(range(3, 3 + length)) for length in (7, 41, 5, 100)]
    arch, model = _imported(path, tp, pp, sp, **layout)
    logits = _packed_logits(model, sequences, pad_multiple=tp if sp else 1)
    if logits is None:
        return 0.0
    assert logits.shape[1] == arch.padded_vocab_size(tp)
    assert not logits[:, arch.vocab_size :].any(), "padding rows of the vocabulary are zero"
    difference = (logits[:, : arch.vocab_size] - _transformers_logits(path, sequences)).abs().max().item()
    assert difference < 1e-5, f"logits of {path} at TP{tp} PP{pp} SP{sp} differ by {difference}"
    return difference


def check_export_bitwise(path: str, tp: int, pp: int, *, bucket_bytes: int = 1 << 16, **layout) -> None:
    """Check that on every rank the stream yields the source's tensors, bit for bit, in a Hugging Face model's order."""
    source = _tensors(path)
    arch, model = _imported(path, tp, pp, **layout)
    streamed = list(stream_hf_weights(model, arch, bucket_bytes=bucket_bytes))
    names = [name for name, _ in streamed]
    assert len(set(names)) == len(names)
    expected = set(source) - ({"lm_head.weight"} if arch.tied_embeddings else set())
    assert set(names) == expected, f"rank {dist.get_rank()}: {set(names) ^ expected}"
    for name, tensor in streamed:
        assert tensor.dtype == source[name].dtype and torch.equal(tensor, source[name]), (
            f"rank {dist.get_rank()}: {name}"
        )


def check_save_round_trip(path: str, out: str, tp: int, pp: int, **layout) -> None:
    """What `save_hf` writes, in several shards, are the source's tensors and companion files; it loads again."""
    arch, model = _imported(path, tp, pp, **layout)
    save_hf(model, arch, path, out, max_shard_bytes=300_000)
    check_export_equals(path, out)
    check_export_bitwise(out, tp, pp, **layout)


def check_export_equals(path: str, out: str) -> None:
    """The directory `out` holds the same tensors and companion files as `path`, and nothing temporary is left."""
    ours, source = _tensors(out), _tensors(path)
    assert ours.keys() == source.keys() and all(torch.equal(ours[name], source[name]) for name in source)
    assert len(list(Path(out).glob("*.safetensors"))) > 1 and (Path(out) / "model.safetensors.index.json").is_file()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (Path(out) / file).read_bytes() == (Path(path) / file).read_bytes()
    assert not list(Path(out).parent.glob("*.incomplete"))
    assert Architecture.from_hf(out).hf_config == Architecture.from_hf(path).hf_config


def _imported(path: str, tp: int, pp: int, sp: bool = False, precision: str = "fp32", **layout) -> tuple:
    """Return (Architecture, this rank's model with the weights of `path`)."""
    config = ModelConfig(
        path=path,
        precision=precision,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=sp,
        **layout,
    )
    use_layout(config)
    arch = Architecture.from_hf(path)
    model = build_model(arch, config)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))  # whatever is not loaded shows
    load_hf_weights(model, arch, path)
    return arch, model


def _packed_logits(model, sequences: list[list[int]], pad_multiple: int):
    """Return full-vocabulary logits [T, padded vocabulary] on the last stage, None on others."""
    batch = SequenceBatch.from_lists([s[:1] for s in sequences], [s[1:] for s in sequences])
    micro = build_microbatch(batch, list(range(len(sequences))), device=world.device(), pad_multiple=pad_multiple)

    def forward(iterator, model):
        next(iterator)
        hidden = model(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed)
        return hidden, lambda hidden, **kwargs: hidden

    with megatron_device(), torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([0]),
            model=model.eval(),
            num_microbatches=1,
            seq_length=micro.tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs:
            return None
        hidden = outputs[0].transpose(0, 1)  # [T, 1, H]
        if model.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        logits = hidden.squeeze(1) @ output_weight(model).t()
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)[: sum(map(len, sequences))]


def _transformers_logits(path: str, sequences: list[list[int]]) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([reference(torch.tensor([tokens])).logits[0] for tokens in sequences])


def _tensors(path: str) -> dict[str, torch.Tensor]:
    return {name: t for file in Path(path).glob("*.safetensors") for name, t in load_file(file).items()}
