"""vLLM and the policy in one process: vLLM gets the policy's weights, sleeps while the policy trains, and samples at
vLLM's own speed. The engine itself compares fingerprints at every refit and raises when one differs."""

from __future__ import annotations

import functools
import time

import psutil
import torch

from acceptance import batches, models, policy
from acceptance.checks import parity
from acceptance.context import Context
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.objective import build_objective
from frpo_nemo.rollout.engine import RolloutEngine
from frpo_nemo.rollout.refit_check import logprob_gap

SAMPLES = batches.GROUP_SIZE
MAX_NUM_SEQS = 128
UTILIZATION = 0.4  # share of GPU memory; a second engine needs room too


class Colocated:
    """An engine and the policy that it follows, in the order in which a run makes them."""

    def __init__(self, context: Context, *, enforce_eager: bool | None, tensor_parallel_size: int = 1, **layout):
        self.context = context
        self.longest, self.vocabulary = context.on(cuda=(256, 32003), cpu=(24, 131))
        self.engine = RolloutEngine(
            models.small(context),
            dtype="bfloat16",
            max_model_len=2 * self.longest,
            tensor_parallel_size=tensor_parallel_size,
            gpu_memory_utilization=UTILIZATION,
            max_num_seqs=MAX_NUM_SEQS,
            enforce_eager=enforce_eager,
        )
        context.closing.callback(self.engine.close)
        self.engine.sleep()
        self.actor = parity.actor(context, lr=context.on(cuda=5e-5, cpu=1e-3), **layout)

    def refit(self) -> None:
        """Send the weights as a run does: the optimizer leaves the GPU first."""
        self.actor.finish_training()
        self.engine.refit(self.actor.stream_hf_weights())

    def sample(self, prompts: int = 16, seed: int = 3) -> SequenceBatch:
        """Sample SAMPLES responses to each of random prompts, with random rewards and the token column rollout_logprobs."""
        generator = torch.Generator().manual_seed(seed)
        shape = (prompts, self.longest // 4)
        ids = torch.randint(2, self.vocabulary, shape, generator=generator).tolist()
        groups = self.engine.generate(ids, max_tokens=self.longest, seed=seed, stop_token_ids=[1], samples=SAMPLES)
        responses = [completion for group in groups for completion in group]
        count = len(responses)
        batch = SequenceBatch.from_lists(
            [prompt for prompt in ids for _ in range(SAMPLES)],
            [response.token_ids for response in responses],
            group=torch.arange(count) // SAMPLES,
            reward=torch.rand(count, generator=generator).double(),
        )
        batch.token_columns["rollout_logprobs"] = torch.tensor([x for r in responses for x in r.logprobs])
        return batch

    def gap(self, batch: SequenceBatch) -> float:
        """Return the mean difference of the sampled log-probs from the policy's present ones."""
        return logprob_gap(batch.token_columns["rollout_logprobs"], self.actor.get_inference_log_probs(batch))[0]

    def learn(self, batch: SequenceBatch) -> None:
        """Make one FRPO update while the engine sleeps."""
        self.engine.sleep()
        self.actor.prepare_for_training()
        loss = batches.policy_loss(batch, build_objective({"name": "frpo", "lambda_": 0.5}))
        self.actor.train_step(batch, loss, update=0, total_updates=1)


@functools.cache
def _colocated(context: Context) -> Colocated:
    """Start the pair that the checks share, with CUDA graphs where there is CUDA."""
    return Colocated(context, enforce_eager=None)


def refit(context: Context) -> dict:
    """Measure the gap after the first refit of an engine that began without weights."""
    pair = _colocated(context)
    pair.refit()
    return {"gap": pair.gap(pair.sample())}


def follows(context: Context) -> dict:
    """Update the policy with CUDA graphs in the engine."""
    return three_updates(_colocated(context))


def eager_follows(context: Context) -> dict:
    """Update the policy without CUDA graphs in the engine."""
    return three_updates(Colocated(context, enforce_eager=True))


def tp2_follows(context: Context) -> dict:
    """Update a policy of two stages, with one engine on both ranks."""
    return three_updates(
        Colocated(context, enforce_eager=None, tensor_parallel_size=2, pipeline_model_parallel_size=2)
    )


def three_updates(pair: Colocated) -> dict:
    """Refit after each of three updates. gap: the largest afterwards. stale_gap: the smallest between old samples and new
    weights, which a stale engine would show. same_responses: the share that an update does not change, with one seed."""
    pair.refit()
    gaps, changes, same = [], [], []
    for _ in range(3):
        old = pair.sample()
        pair.learn(old)
        changes.append(pair.gap(old))
        pair.refit()
        new = pair.sample()
        gaps.append(pair.gap(new))
        same.append(_share_of_same(old, new))
    return {"gap": max(gaps), "stale_gap": min(changes), "same_responses": max(same)}


def sleep(context: Context) -> dict:
    """Sample, sleep, wake and sample the same again. freed_share: of the memory that vLLM may use. changed: log-probs that
    differ. growth_mib: of the memory in use while awake, after more sleeps."""
    pair = _colocated(context)
    pair.refit()
    first, awake, total = pair.sample(), *_memory_in_use(context)
    pair.engine.sleep()
    asleep, _ = _memory_in_use(context)
    pair.engine.wake()
    second = pair.sample()
    for _ in range(2):
        pair.engine.sleep()
        pair.engine.wake()
    same_tokens = torch.equal(first.tokens, second.tokens)
    return {
        "freed_share": (awake - asleep) / (UTILIZATION * total),
        "changed": int(not same_tokens) or (_logprobs(first) != _logprobs(second)).sum().item(),
        "growth_mib": (_memory_in_use(context)[0] - awake) / 2**20,
    }


def graphs(context: Context) -> dict:
    """Ask vLLM how many CUDA graphs it captured in this process."""
    from vllm.compilation.counter import compilation_counter

    config = _colocated(context).engine._llm.llm_engine.vllm_config.compilation_config
    return {"captured": compilation_counter.num_cudagraph_captured, "mode": config.cudagraph_mode.name}


def speed(context: Context) -> dict:
    """Time the same requests with RolloutEngine, which returns log-probs, and with plain vLLM, which does not."""
    pair = _colocated(context)
    pair.refit()
    prompts, length = context.on(cuda=(64, 256), cpu=(16, 24))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, pair.vocabulary, (prompts, pair.longest // 4), generator=generator).tolist()
    own = _tokens_per_second(
        lambda: sum(
            len(completion.token_ids)
            for group in pair.engine.generate(ids, max_tokens=length, seed=1, stop_token_ids=[], samples=SAMPLES)
            for completion in group
        )
    )
    pair.engine.sleep()
    plain = _tokens_per_second(_plain_vllm(context, ids, length))
    return {"ratio": own / plain, "tokens_per_second": own, "plain_tokens_per_second": plain}


def _plain_vllm(context: Context, ids: list[list[int]], length: int):
    """Return a function that samples with vLLM's own defaults and returns the number of tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        models.small(context),
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=2 * length,
        max_num_seqs=MAX_NUM_SEQS,
        gpu_memory_utilization=UTILIZATION,
        enforce_eager=not context.cuda,  # as RolloutEngine on a CPU
        use_tqdm_on_load=False,
    )
    params = SamplingParams(n=SAMPLES, max_tokens=length, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in ids]

    def generate() -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(requests, params, use_tqdm=False)
        return sum(len(response.token_ids) for output in outputs for response in output.outputs)

    return generate


def _tokens_per_second(generate) -> float:
    """Return the better of two rates, after a call that warms up."""
    rates = []
    for _ in range(3):
        started = time.monotonic()
        tokens = generate()
        rates.append(tokens / (time.monotonic() - started))
    return max(rates[1:])


def _memory_in_use(context: Context) -> tuple[int, int]:
    """Return (bytes in use, bytes in all) of the GPU, or of the host by this process."""
    policy.free()
    if context.cuda:
        free, total = torch.cuda.mem_get_info()
        return total - free, total
    return psutil.Process().memory_info().rss, psutil.virtual_memory().total


def _share_of_same(old: SequenceBatch, new: SequenceBatch) -> float:
    pairs = zip(old.unpack(), new.unpack(), strict=True)
    return sum(before == after for before, after in pairs) / old.num_sequences


def _logprobs(batch: SequenceBatch) -> torch.Tensor:
    return batch.token_columns["rollout_logprobs"]
