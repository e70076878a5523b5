"""Checks of the rollout engine that run inside a process group: every rank calls them with `tiny`, name -> directory of
a model of MODELS. Engines are kept from one check to the next: starting one takes seconds."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from worlds import use_layout

from frpo_nemo.config.options import EngineConfig, ModelConfig
from frpo_nemo.data.prompts import Prompt, PromptSet
from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.megatron.logprobs import vocab_parallel_logits
from frpo_nemo.processes.phases import PhaseTimer
from frpo_nemo.rollout import RefitError, RolloutEngine, check_logprob_gap, logprob_gap
from frpo_nemo.rollout import engine as engine_module
from frpo_nemo.rollout.refit_check import GapLimit, WeightCheck, live_shards
from frpo_nemo.rollout.worker import RolloutWorker

EOS = 1
MODELS = {  # the vocabulary is odd, so that vLLM pads it
    "qwen2": dict(family="qwen2", seed=1),
    "qwen2 other": dict(family="qwen2", seed=2),
    "qwen3": dict(family="qwen3", seed=3),
    "tied": dict(family="llama", tied=True, seed=4),
    "mistral": dict(family="mistral", seed=5),
    "one kv head": dict(family="qwen2", num_key_value_heads=1, seed=6),
    "five layers": dict(family="llama", layers=5, tied=True, seed=7),
    "experts": dict(family="qwen3_moe", layers=2, seed=8),
    "experts other": dict(family="qwen3_moe", layers=2, seed=9),
    "experts and dense layers": dict(family="qwen3_moe", layers=2, decoder_sparse_step=2, norm_topk_prob=False, seed=10),
    "mixtral": dict(family="mixtral", layers=2, seed=11),
}
LOST = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm")  # of one layer
_engines: dict[tuple, RolloutEngine] = {}


def use_engine(path: str, *, tp: int = 1, **settings) -> RolloutEngine:
    """Return the engine of these settings, made at the first call. vLLM keeps one tensor-parallel layout per process."""
    key = (path, tp, *settings.items())
    if key not in _engines:
        if any(other[1] != tp for other in _engines):
            from vllm.distributed.parallel_state import destroy_model_parallel

            _engines.clear()
            destroy_model_parallel()
        settings = dict(dtype="float32", max_model_len=256, max_num_seqs=64) | settings
        _engines[key] = RolloutEngine(path, tensor_parallel_size=tp, **settings)
    return _engines[key]


def hf_model(path: str, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def hf_weights(path: str) -> list[tuple[str, Tensor]]:
    """Return the weights as a policy streams them: (Hugging Face name, full tensor)."""
    model = hf_model(path)
    if getattr(model.config, "num_experts_per_tok", None):  # transformers stacks experts, files and streams do not
        return [pair for file in Path(path).glob("*.safetensors") for pair in load_file(file).items()]
    return list(model.state_dict().items())


def prompts() -> list[list[int]]:
    """The last is longer than a block of vLLM's prefix cache on CPU (128), which its group then shares."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 131, (length,), generator=generator).tolist() for length in (1, 5, 23, 150)]


def sample(engine: RolloutEngine, **settings) -> list[tuple[list[int], list[float], bool]]:
    """Return (tokens, log-probs, truncated) of 3 responses to each prompt."""
    settings = dict(samples=3, max_tokens=24, seed=11, stop_token_ids=[EOS]) | settings
    groups = engine.generate(prompts(), **settings)
    return [(c.token_ids, c.logprobs, c.truncated) for group in groups for c in group]


@torch.no_grad()
def reference_logprobs(
    model, responses, temperature: float = 1.0, samples: int = 3, asked: list | None = None
) -> Tensor:
    """Return transformers' log-probs of the responses to `asked` (prompts() by default), one after the other."""
    out = []
    for i, (tokens, _, _) in enumerate(responses):
        prompt = (asked or prompts())[i // samples]
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float() / temperature
        out.append(logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)])
    return torch.cat(out)


def gap_to(path: str, engine: RolloutEngine, temperature: float = 1.0, dtype=torch.float32) -> tuple[float, float]:
    """Return (mean, largest) difference between the engine's log-probs and transformers' with the model at `path`."""
    responses = sample(engine)
    rollout = torch.tensor([logprob for _, logprobs, _ in responses for logprob in logprobs])
    return logprob_gap(rollout, reference_logprobs(hf_model(path, dtype), responses, temperature))


def refitted(tiny: dict[str, str], name: str = "qwen2", tp: int = 1) -> RolloutEngine:
    """Return the engine that most checks share, holding the weights of `name`."""
    engine = use_engine(tiny["qwen2"], tp=tp)
    engine.refit(hf_weights(tiny[name]))
    return engine


def refit_error(engine: RolloutEngine, weights) -> str:
    try:
        engine.refit(weights)
    except RefitError as error:
        return str(error)
    raise AssertionError("the refit went through")


# A world of one


def check_generate_before_refit(tiny) -> None:
    try:
        sample(use_engine(tiny["qwen2"]))
    except RuntimeError as error:
        assert "before the first refit" in str(error)
        return
    raise AssertionError("sampled from random weights")


def check_refit_changes_the_model(tiny) -> None:
    engine = refitted(tiny, "qwen2")
    assert gap_to(tiny["qwen2"], engine)[1] < 1e-5
    assert gap_to(tiny["qwen2 other"], engine)[0] > 0.1
    refitted(tiny, "qwen2 other")
    assert gap_to(tiny["qwen2 other"], engine)[1] < 1e-5


def check_compiled_model(tiny) -> None:
    """Refits go into the storage that the compiled model reads, so they compile nothing, and the same seed gives the same."""
    from torch._dynamo.utils import counters

    engine = use_engine(tiny["qwen2"], enforce_eager=False)
    sampled = []
    for name in ("qwen2", "qwen2 other", "qwen2"):
        engine.refit(hf_weights(tiny[name]))
        mean, largest = gap_to(tiny[name], engine)
        assert largest < 1e-5, f"{name}: {largest}"
        sampled.append((sample(engine), counters["stats"]["unique_graphs"]))
    assert sampled[0] == sampled[2] and sampled[0][0] != sampled[1][0]
    assert sampled[0][1] == sampled[1][1] > 0


def check_family(tiny, name: str, temperature: float = 1.0, **settings) -> None:
    engine = use_engine(tiny[name], temperature=temperature, **settings)
    if settings.get("load_format") != "auto":
        engine.refit(hf_weights(tiny[name]))
    mean, largest = gap_to(tiny[name], engine, temperature)
    assert largest < 1e-5, f"{name}: {largest}"


def check_bfloat16(tiny) -> tuple[float, float]:
    """fp32 weights are rounded on their way in; the gap to transformers in bf16 is rounding alone."""
    engine = use_engine(tiny["tied"], dtype="bfloat16")
    engine.refit(hf_weights(tiny["tied"]))
    mean, largest = gap_to(tiny["tied"], engine, dtype=torch.bfloat16)
    assert 0 < mean < 0.02, mean
    return mean, largest


def check_fp32_logits(tiny) -> dict[bool, float]:
    """fp32_logits -> the largest difference of vLLM's logits of bf16 hidden states from the trainer's."""
    differences = {}
    for fp32_logits in (False, True):
        engine = use_engine(tiny["tied"], dtype="bfloat16", fp32_logits=fp32_logits)
        engine.refit(hf_weights(tiny["tied"]))
        model = engine._model()
        weight = model.model.embed_tokens.weight
        hidden = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        theirs = model.compute_logits(hidden).float()
        ours = vocab_parallel_logits(
            hidden, weight, vocab_size=theirs.shape[1], tp_rank=0, temperature=1.0, in_fp32=True
        )[:, : theirs.shape[1]]
        differences[fp32_logits] = (theirs - ours).abs().max().item()
    return differences


def check_responses(tiny) -> list:
    """Check that seeds reproduce, EOS comes last, truncation is reported and random state is unchanged; return responses."""
    engine = refitted(tiny)
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    untouched = random.random(), np.random.rand(), torch.rand(2).tolist()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    first = sample(engine, max_tokens=60)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == untouched
    assert sample(engine, max_tokens=60) == first
    assert sample(engine, max_tokens=60, seed=12) != first
    assert len({tuple(tokens) for tokens, _, _ in first}) == len(first)
    for tokens, logprobs, truncated in first:
        assert len(tokens) == len(logprobs) and EOS not in tokens[:-1]
        assert truncated == (tokens[-1] != EOS) and (not truncated or len(tokens) == 60)
    assert {truncated for _, _, truncated in first} == {True, False}
    return first


def check_top_p(tiny) -> None:
    """Tokens come from the nucleus, their log-probs from the full distribution."""
    engine, model = refitted(tiny), hf_model(tiny["qwen2"])
    responses = sample(engine, top_p=0.5)
    rollout = torch.tensor([logprob for _, logprobs, _ in responses for logprob in logprobs])
    assert logprob_gap(rollout, reference_logprobs(model, responses))[1] < 1e-5
    assert (
        likelier_mass(model, responses).max() < 0.5
    )  # of tokens before it: else it were not among those that reach 0.5
    assert likelier_mass(model, sample(engine)).max() > 0.5


@torch.no_grad()
def likelier_mass(model, responses, samples: int = 3) -> Tensor:
    """Return, for each token of the responses to prompts(), the total probability of the likelier tokens there."""
    out = []
    for i, (tokens, _, _) in enumerate(responses):
        prompt = prompts()[i // samples]
        probs = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
        own = probs[torch.arange(len(tokens)), torch.tensor(tokens)].unsqueeze(-1)
        out.append(probs.where(probs > own, 0).sum(-1))
    return torch.cat(out)


def check_sampling_masks(tiny, tp: int = 1) -> None:
    """The kept tokens are those of the definition, and log-probs are of the softmax over them; at a temperature too. With
    few tokens a step, prompts are read in pieces, and rows of the sampler belong to no token."""
    for temperature, settings in ((1.0, dict(top_p=0.9)), (1.0, dict(top_k=20)), (0.7, dict(top_p=0.5, top_k=40))):
        engine = use_engine(tiny["qwen2"], tp=tp, temperature=temperature, sampling_masks=True, load_format="auto")
        groups = engine.generate(prompts(), samples=3, max_tokens=24, seed=11, stop_token_ids=[EOS], **settings)
        model, sizes = hf_model(tiny["qwen2"]), set()
        for prompt, group in zip(prompts(), groups, strict=True):
            for response in group:
                tokens = torch.tensor(response.token_ids)
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1].double()
                logits /= temperature
                assert len(response.kept) == len(tokens)
                allowed = kept_by_definition(logits, **settings)
                mask = torch.zeros_like(allowed)
                for row, ids in enumerate(response.kept):
                    mask[row, ids] = True
                assert torch.equal(mask, allowed), (settings, (mask != allowed).nonzero())
                expected = logits.masked_fill(~mask, -torch.inf).log_softmax(-1)[torch.arange(len(tokens)), tokens]
                assert (torch.tensor(response.logprobs) - expected).abs().max() < 1e-5
                sizes |= set(map(len, response.kept))
        assert len(sizes) > 1 or "top_k" in settings
        greedy = engine.generate(prompts(), max_tokens=3, seed=1, stop_token_ids=[EOS], temperature=0.0)
        assert all(response.kept is None and not response.logprobs for [response] in greedy)


def kept_by_definition(logits: Tensor, top_p: float = 1.0, top_k: int = -1) -> Tensor:
    """Return which tokens are among the top_k and then in the smallest set of the likeliest that reaches top_p. bool [T, V]"""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if top_k > 0:
        kept &= logits >= logits.topk(top_k).values[:, -1:]
    probabilities = logits.masked_fill(~kept, -torch.inf).softmax(-1)
    ordered, places = probabilities.sort(descending=True)
    inside = ordered.cumsum(-1) - ordered < top_p
    return kept & torch.zeros_like(kept).scatter(-1, places, inside)


def check_other_sampling(tiny) -> None:
    """Another temperature gives no log-probs; top-k at temperature 1 gives those of the full distribution."""
    engine = refitted(tiny)
    greedy = sample(engine, temperature=0.0, samples=1)
    assert greedy == sample(engine, temperature=0.0, samples=1, seed=5) and not greedy[0][1]
    responses = sample(engine, top_k=3)
    rollout = torch.tensor([logprob for _, logprobs, _ in responses for logprob in logprobs])
    assert logprob_gap(rollout, reference_logprobs(hf_model(tiny["qwen2"]), responses))[1] < 1e-5
    assert engine.generate([], max_tokens=3, seed=1, stop_token_ids=[EOS]) == []


def check_bad_requests(tiny) -> None:
    warm = use_engine(tiny["qwen3"], temperature=0.7)
    for engine, settings, message in [
        (warm, dict(top_p=0.9), "temperature=0.7 together with top_p"),
        (refitted(tiny), dict(max_tokens=128), "do not fit into max_model_len=256"),
    ]:
        try:
            sample(engine, **settings)
        except ConfigError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"no error for {settings}")


def check_faults_are_named(tiny, tp: int = 1) -> list[str]:
    """Every way in which a refit can go wrong is caught, and the message names the tensor."""
    engine = refitted(tiny, tp=tp)
    weights = hf_weights(tiny["qwen2 other"])
    layer = "model.layers.1.self_attn"
    index = [name for name, _ in weights].index(f"{layer}.k_proj.weight")
    skipped = refit_error(engine, weights[:index] + weights[index + 1 :])
    assert f"{layer}.k_proj.weight was not in the weight stream" in skipped
    assert "came twice" in refit_error(engine, weights + weights[index : index + 1])
    odd_one = ("model.layers.1.input_layernorm.weight", torch.ones(4))
    assert "does not fit" in _stream_problem(engine, odd_one)
    assert "no such tensor" in _stream_problem(engine, ("model.layers.99.mlp.bias", torch.ones(4)))
    messages = [skipped]
    for fault in (_flip_one_bit, _swap_k_and_v, _keep_old_norm, _permute_heads):
        engine.refit(hf_weights(tiny["qwen2"]))
        message = _refit_with_fault(engine, weights, fault)
        assert fault.tensor in message and "differs from the tensor sent" in message, message
        messages.append(message)
    engine.refit(weights)  # and a correct one afterwards succeeds
    return messages


def _stream_problem(engine: RolloutEngine, pair: tuple[str, Tensor]) -> str:
    """Return what the check reports about a tensor, without vLLM, whose own assertions come first."""
    check = WeightCheck(engine._model(), torch.float32)
    list(check.watch([pair]))
    return check.problems()[0]


def _refit_with_fault(engine: RolloutEngine, weights, fault) -> str:
    """Return the error of a refit during which `fault(model)` damages the engine's live weights after they arrived."""
    reload = engine._llm.collective_rpc
    before = {name: shard.live.clone() for name, shard in live_shards(engine._model()).items()}

    def reload_and_damage(*args, **kwargs):
        reload(*args, **kwargs)
        if dist.get_rank() == dist.get_world_size() - 1:
            fault(live_shards(engine._model()), before)

    engine._llm.collective_rpc = reload_and_damage
    try:
        return refit_error(engine, weights)
    finally:
        engine._llm.collective_rpc = reload


def _flip_one_bit(shards, before) -> None:
    shards[_flip_one_bit.tensor].live.view(torch.int32)[3, 5] ^= 1


def _swap_k_and_v(shards, before) -> None:
    k, v = (shards[f"model.layers.2.self_attn.{x}_proj.weight"].live for x in "kv")
    k_sent = k.clone()
    k.copy_(v)
    v.copy_(k_sent)


def _keep_old_norm(shards, before) -> None:
    shards[_keep_old_norm.tensor].live.copy_(before[_keep_old_norm.tensor])


def _permute_heads(shards, before) -> None:
    live = shards[_permute_heads.tensor].live
    live.copy_(live.roll(32, 0))


_flip_one_bit.tensor = "model.layers.0.mlp.down_proj.weight"
_swap_k_and_v.tensor = "model.layers.2.self_attn.v_proj.weight"
_keep_old_norm.tensor = "model.norm.weight"
_permute_heads.tensor = "model.layers.3.self_attn.q_proj.weight"


def check_refit_of_experts(tiny, name: str, tp: int = 1) -> None:
    """The engine computes with what the last refit sent, whatever came before: a checkpoint, random weights or a refit."""
    engine = use_engine(tiny[name], tp=tp, load_format="auto" if name == "experts" else "dummy")
    if name == "experts":
        assert gap_to(tiny[name], engine)[1] < 1e-5
    for _ in range(2):
        if name == "experts":
            engine.refit(hf_weights(tiny["experts other"]))
            assert gap_to(tiny["experts other"], engine)[1] < 1e-5
        engine.refit(hf_weights(tiny[name]))
        assert gap_to(tiny[name], engine)[1] < 1e-5


def check_faults_of_experts_are_named(tiny) -> None:
    engine = use_engine(tiny["experts"], load_format="auto")
    weights = hf_weights(tiny["experts other"])
    router, down = "model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.5.down_proj.weight"
    assert f"{down} was not in the weight stream" in refit_error(engine, [w for w in weights if w[0] != down])

    def flip_one_bit(shards, before):
        shards[flip_one_bit.tensor].live.view(torch.int32)[3, 5] ^= 1

    def swap_gate_and_up(shards, before):
        gate, up = (shards[f"model.layers.1.mlp.experts.7.{x}_proj.weight"].live for x in ("gate", "up"))
        sent = gate.clone()
        gate.copy_(up)
        up.copy_(sent)

    swap_gate_and_up.tensor = "experts.7.up_proj.weight"
    for fault, tensor in ((flip_one_bit, router), (flip_one_bit, down), (swap_gate_and_up, swap_gate_and_up.tensor)):
        fault.tensor = tensor
        message = _refit_with_fault(engine, weights, fault)
        assert tensor in message and "differs from the tensor sent" in message, message
    engine.refit(weights)


@torch.no_grad()
def routes_of_transformers(path: str, tokens: list[int]) -> Tensor:
    """Return the experts that transformers' model chooses, in order: [tokens, layers with experts, chosen]."""
    model, chosen = hf_model(path), []
    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2].sort(-1).values))
    model(torch.tensor([tokens]))
    return torch.stack(chosen, 1)


def check_routes(tiny, name: str, tp: int = 1, scarce: bool = False) -> int:
    """Every response comes with the experts that were chosen for its tokens and its prompt's, which three responses share.
    scarce: prompts are read in pieces, and the KV cache is too small for all requests. Returns how many were preempted."""
    small = dict(max_num_batched_tokens=64, num_gpu_blocks_override=9, block_size=32) if scarce else {}
    start = engine_module._start_vllm
    engine_module._start_vllm = lambda *index, **settings: start(*index, **settings, **small)
    try:
        engine = use_engine(tiny[name], tp=tp, routes=True, load_format="auto", max_model_len=200 if scarce else 256)
    finally:
        engine_module._start_vllm = start
    scheduler, preempted = engine._llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *request, **how: preempted.append(1) or preempt(*request, **how)
    try:
        for seed in (1, 2):  # the second finds none of the first's prefixes
            groups = engine.generate(prompts(), samples=3, max_tokens=40, seed=seed, stop_token_ids=[EOS])
            for prompt, group in zip(prompts(), groups, strict=True):
                for response in group:
                    tokens = [*prompt, *response.token_ids]
                    found = torch.from_numpy(response.routes).long()
                    expected = routes_of_transformers(tiny[name], tokens)
                    assert found.shape == expected.shape
                    assert torch.equal(found[:-1].sort(-1).values, expected[:-1])
                    assert all(len(set(row)) == len(row) for row in found[-1].tolist())
    finally:
        scheduler._preempt_request = preempt
    return len(preempted)


def check_of(worker: RolloutWorker, actor: PolicyActor) -> WeightCheck:
    """Return the check of the weights that the actor would send to the worker's engine."""
    check = WeightCheck(worker.engine._model(), torch.float32)
    for _ in check.watch(actor.stream_hf_weights()):
        pass
    return check


def check_proof_by_computing(tiny, name: str, layer: str) -> str:
    """A layer that computes with a copy of its weights, made before a refit, passes every fingerprint; the check after the
    first refit of a start finds it. Returns its message."""
    model = ModelConfig(path=tiny[name], precision="fp32")
    rollout = EngineConfig(max_num_seqs=8, routing_replay="expert" in layer)
    worker = RolloutWorker(model, rollout, PhaseTimer(), seed=1, max_model_len=64)
    _engines[tiny[name], 1, "proof", layer] = worker.engine  # an engine that ends takes the process group with it
    use_layout(model)
    actor = PolicyActor(model, microbatch_tokens=256)
    examples = [Prompt(ids, [], None, {}) for ids in prompts()[:3]]
    module = worker.engine._model().get_submodule(layer)
    if layer.endswith("experts"):
        module = module.routed_experts
        kernel = module.quant_method.moe_kernel.fused_experts
        holder, attribute, stale = kernel, "packed", kernel.packed
    else:
        copy = module.weight.detach().clone()
        holder, attribute = module, "cpu_linear"
        stale = lambda x, weight, bias=None: torch.nn.functional.linear(x, copy, bias)  # noqa: E731
    worker.refit(actor)
    worker.prove(actor, PromptSet(examples, dropped=0), 0, 16)
    worker.refit(actor)
    setattr(holder, attribute, stale)
    assert not check_of(worker, actor).problems(), "no fingerprint differs"
    try:
        worker.prove(actor, PromptSet(examples, dropped=0), 0, 16)
    except RefitError as error:
        return str(error)
    raise AssertionError("a stale copy passed")


def check_stream_is_exhausted(tiny) -> None:
    """Check that the stream ends on every rank, as its collectives must, also when vLLM has all it needs before the end."""
    engine, ended = use_engine(tiny["qwen2"]), []

    def stream():
        yield from hf_weights(tiny["qwen2"])
        ended.append(True)

    engine.refit(stream())
    assert ended


def check_stale_engine_shows_in_the_gap(tiny) -> str:
    engine = refitted(tiny, "qwen2")
    responses = sample(engine)
    rollout = torch.tensor([logprob for _, logprobs, _ in responses for logprob in logprobs])
    lengths = torch.tensor([len(tokens) for tokens, _, _ in responses])
    good, stale = (reference_logprobs(hf_model(tiny[name]), responses) for name in ("qwen2", "qwen2 other"))
    limit = GapLimit.of("fp32", None)
    check_logprob_gap(rollout, good, lengths, step=4, limit=limit)
    try:
        check_logprob_gap(rollout, stale, lengths, step=4, limit=limit)
    except RefitError as error:
        return str(error)
    raise AssertionError("a stale engine passed")


def check_a_lost_weight_shows_in_the_gap(
    tiny, path: str | None = None, asked: list | None = None, layers=range(5), max_tokens: int = 24
) -> dict:
    """In bf16, after a rollout that sets the limit: a healthy one passes, and one with a weight of one layer lost (all
    zero, behind the fingerprints' back) is stopped. path: of the model, with the prompts `asked`; None: a tiny one.
    Returns the gap of each over the limit."""
    path, asked = path or tiny["five layers"], asked or prompts()
    engine, policy = use_engine(path, dtype="bfloat16"), hf_model(path, torch.bfloat16)
    engine.refit(hf_weights(path))
    shards, limit = live_shards(engine._model()), GapLimit.of("bf16", None)

    def gap(seed: int) -> float:
        groups = engine.generate(asked, samples=3, max_tokens=max_tokens, seed=seed, stop_token_ids=[EOS])
        responses = [(c.token_ids, c.logprobs, c.truncated) for group in groups for c in group]
        rollout = torch.tensor([logprob for _, logprobs, _ in responses for logprob in logprobs])
        lengths = torch.tensor([len(tokens) for tokens, _, _ in responses])
        return check_logprob_gap(
            rollout, reference_logprobs(policy, responses, asked=asked), lengths, step=2, limit=limit
        )[0]

    limit = GapLimit.of("bf16", gap(1))
    found = {"healthy": gap(2) / limit.value}
    for name in [f"model.layers.{layer}.{part}.weight" for layer in layers for part in LOST]:
        live = shards[name].live
        kept = live.clone()
        live.zero_()
        try:
            gap(2)
        except RefitError as error:
            found[name] = float(re.search("differ by (\\S+)", str(error))[1]) / limit.value
        else:
            raise AssertionError(f"the loss of {name} passed")
        live.copy_(kept)
    return found


# A world of two


def check_two_engines(tiny) -> list:
    """Two engines of TP1: each its own responses. Returns this rank's."""
    engine = refitted(tiny)
    assert (engine.num_engines, engine.engine_index) == (2, dist.get_rank())
    assert gap_to(tiny["qwen2"], engine)[1] < 1e-5
    return sample(engine, max_tokens=60)


def check_one_engine_of_two(tiny, name: str) -> list:
    """One engine of TP2: both ranks see the same responses, right ones, from shards that were proven."""
    engine = use_engine(tiny[name], tp=2)
    assert (engine.num_engines, engine.engine_index) == (1, 0)
    engine.refit(hf_weights(tiny[name]))
    assert gap_to(tiny[name], engine)[1] < 1e-5
    return sample(engine)


def check_fault_on_one_rank(tiny) -> list[str]:
    return check_faults_are_named(tiny, tp=2)


def check_layout_that_does_not_fit(tiny) -> str:
    try:
        RolloutEngine(tiny["qwen2"], dtype="float32", max_model_len=64, tensor_parallel_size=3)
    except ConfigError as error:
        return str(error)
    raise AssertionError("no error")
