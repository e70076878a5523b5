"""Make the rollouts of a step: send prompts through the colocated vLLM engines and the rewards into one global ragged batch.

Every engine generates whole groups for its share of the prompts; the ranks of an engine share the scoring. The results
(token ids, small) are gathered on every rank, in the order of the prompts.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from frpo_nemo.config.options import EngineConfig, ModelConfig, SourceConfig
from frpo_nemo.data.batch import KeptTokens, SequenceBatch
from frpo_nemo.data.prompts import Prompt, PromptSet, load_prompts
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.objective.parts import compared_rewards, partly_scored
from frpo_nemo.processes import world
from frpo_nemo.processes.phases import PhaseTimer
from frpo_nemo.rewards.reward_set import RewardSet
from frpo_nemo.rollout import thoughts
from frpo_nemo.rollout.chat import load_chat, stop_token_ids
from frpo_nemo.rollout.engine import RolloutEngine, isolated_rng
from frpo_nemo.rollout.refit_check import GapLimit, check_logprob_gap

PROOF_PROMPTS, PROOF_TOKENS = 32, 16  # of the check after the first refit
PROOF_MARGIN = 2.0  # on a mean over so few tokens: a single one may be off by nats
PROOF = 1 << 31 | 2  # replaces the step in its sampling seed; those of training/probe.py are the others


@dataclass
class Rollouts:
    """A step's responses. `batch` has the columns group, task (index into tasks), truncated, reward (the weighted sum of
    the scored parts), reward/NAME (a part; NaN: unscored), compared (the reward for the objective; NaN: takes no part),
    partly_scored, with rollout.think_end_token also thought_tokens and unfinished_thoughts, and the token column
    rollout_logprobs. failures: reward -> kind -> count."""

    batch: SequenceBatch
    tasks: list[str | None]
    failures: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """Return the rewards that the objective compares."""
        return self.batch.columns["compared"]

    @property
    def groups(self) -> Tensor:
        return self.batch.columns["group"]

    def judge_truncated(self, rule: str) -> None:
        """Change what the objective compares of truncated responses, by rollout.truncated: they leave their group (mask), or
        a scored one counts 0, or less if its reward is (zero). Rewards that are logged stay as they are."""
        truncated, compared = self.batch.columns["truncated"].bool(), self.batch.columns["compared"]
        if rule == "mask":
            self.batch.columns["compared"] = compared.masked_fill(truncated, math.nan)
        if rule == "zero":
            self.batch.columns["compared"] = torch.where(truncated, compared.clamp(max=0.0), compared)

    def require_scores(self) -> None:
        """Raise RuntimeError if no response has a reward, because there is nothing to learn from."""
        if self.rewards.isnan().all():
            raise RuntimeError(
                f"None of {len(self.rewards)} responses could be scored; the rewards failed as shown above."
            )


@dataclass
class ScoredPrompts:
    """Prompts, and the rewards that score responses to them. `tasks`: all that may occur; responses have an index into it."""

    prompts: PromptSet
    rewards: RewardSet
    tasks: list[str | None]

    @classmethod
    def load(cls, sources: Sequence[SourceConfig], rewards: RewardSet, chat, max_prompt_tokens: int) -> ScoredPrompts:
        """Load prompts. chat: the policy's Chat or tokenizer. Raises ConfigError if a task has no reward."""
        prompts = load_prompts(sources, chat, max_prompt_tokens=max_prompt_tokens)
        rewards.check_tasks(prompts.tasks, all_rewards=False)  # all prompts of a task may be too long
        return cls(prompts, rewards, sorted(prompts.tasks, key=str))


class RolloutWorker:
    """This rank's engine: generates, scores and gathers, for any prompts."""

    def __init__(
        self,
        model: ModelConfig,
        rollout: EngineConfig,
        phases: PhaseTimer,
        *,
        seed: int,
        max_model_len: int,
        enforce_eager: bool | None = None,
        load_format: str = "dummy",
        moment: datetime | None = None,
        measured: dict[str, float] | None = None,
    ):
        """Start the engine. torch.distributed must be initialised, and Megatron's model must not exist yet (vLLM measures free
        memory). seed: for sampling. max_model_len: the longest prompt and response together, in tokens. enforce_eager: instead
        of rollout.enforce_eager. load_format: "dummy" waits for the weights of a refit, "auto" reads them from model.path.
        moment: see `load_chat`. measured: Run.measured."""
        self.model, self.rollout, self.phases, self.seed = model, rollout, phases, seed
        self.chat = load_chat(model, moment)
        self.tokenizer = self.chat.tokenizer
        self.stop_token_ids = stop_token_ids(model.path, self.chat, rollout.stop_tokens)
        self.engine = RolloutEngine(
            model.path,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[model.precision],
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            max_model_len=max_model_len,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_num_seqs=rollout.max_num_seqs,
            enforce_eager=rollout.enforce_eager if enforce_eager is None else enforce_eager,
            fp32_logits=model.fp32_logits,
            temperature=rollout.temperature,
            sampling_masks=rollout.mask_replay,
            routes=rollout.routing_replay,
            load_format=load_format,
        )
        self.engine.sleep()  # the policy is built next
        self._reported: set[tuple[str, str]] = set()  # (reward, kind of failure)
        self._said: set[str] = set()
        self.measured = {} if measured is None else measured

    def refit(self, actor: PolicyActor) -> None:
        """Send the policy's weights to the engine and verify that they arrived. Raises RefitError."""
        with self.phases("refit"):
            actor.finish_training()  # the optimizer's GPU memory is vLLM's until the next update
            self.engine.refit(actor.stream_hf_weights(bucket_bytes=self.rollout.refit_bucket_mb << 20))

    def prove(self, actor: PolicyActor, prompts: PromptSet, step: int, max_tokens: int) -> None:
        """Check what the engine computes after its first refit, on a few short responses, before the first rollout, which may
        take an hour. A kernel may hold a copy of its weights that no fingerprint sees. max_tokens: of a response. Raises
        RefitError."""
        count = max(PROOF_PROMPTS, self.engine.num_engines)
        examples = [prompts.examples[i % len(prompts)] for i in range(count)]
        with self.phases("refit"):
            mine, groups = self._generate_share(examples, samples=1, max_tokens=min(PROOF_TOKENS, max_tokens), seed_step=PROOF)
            self.engine.sleep()
            everything = [pair for pairs in world.gather_objects(list(zip(mine, groups, strict=True))) for pair in pairs]
            places, responses = zip(*((place, group[0]) for place, group in everything), strict=True)
            batch = SequenceBatch.from_lists([examples[p].prompt_ids for p in places], [r.token_ids for r in responses])
            if self.rollout.mask_replay:
                batch.kept = KeptTokens.from_lists([ids for r in responses for ids in r.kept])
            if self.rollout.routing_replay:
                batch.routes = torch.cat([torch.from_numpy(r.routes) for r in responses])
            sampled = torch.tensor([logprob for r in responses for logprob in r.logprobs])
            logprobs = actor.get_inference_log_probs(batch)
            actor.finish_inference()
            limit = self.gap_limit
            if limit.statistic == "mean":
                limit = replace(limit, value=PROOF_MARGIN * limit.value)
            check_logprob_gap(sampled, logprobs, batch.response_lengths, step=step, limit=limit)

    def roll_out(
        self, scored: ScoredPrompts, indices: Sequence[int], *, samples: int, max_tokens: int, seed_step: int
    ) -> Rollouts:
        """Return `samples` scored responses of at most `max_tokens` to each of the prompts `indices`. seed_step: determines,
        with the run's seed, what is sampled: the step, or a constant of their own for validation and probes."""
        examples = [scored.prompts.examples[i] for i in indices]
        with self.phases("generate"):
            mine, completions = self._generate_share(examples, samples, max_tokens, seed_step)
            self.engine.sleep()
            world.wait_for_all()  # so that the phase times the slowest engine
        with self.phases("reward"), isolated_rng(self._reward_seed(seed_step)):  # rewards may draw random numbers
            scores, more = self._score(scored.rewards, [examples[i] for i in mine], completions)
        with self.phases("gather"):
            return self._gather(examples, samples, mine, completions, scores, scored, more)

    def _generate_share(self, examples, samples: int, max_tokens: int, seed_step: int):
        """Return (places of the prompts whose responses this rank scores, their responses)."""
        engine, rollout = self.engine, self.rollout
        share = range(engine.engine_index, len(examples), engine.num_engines)
        generated = engine.generate(
            [examples[i].prompt_ids for i in share],
            samples=samples,
            max_tokens=max_tokens,
            seed=sampling_seed(self.seed, seed_step),
            stop_token_ids=self.stop_token_ids,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )
        rank, size = world.rank() % rollout.tensor_model_parallel_size, rollout.tensor_model_parallel_size
        return list(share)[rank::size], generated[rank::size]

    def _reward_seed(self, seed_step: int) -> int:
        """Return the seed of the random numbers that rewards draw in this process, apart from the run's random state."""
        return zlib.crc32(f"reward {sampling_seed(self.seed, seed_step)} {world.rank()}".encode())

    def _score(self, rewards: RewardSet, examples: list[Prompt], completions: list[list]):
        repeated = [(example, c) for example, group in zip(examples, completions, strict=True) for c in group]
        responses = [c.token_ids for _, c in repeated]
        texts, more = self._answers(repeated, responses)
        names = dict.fromkeys(name for example in examples for name in example.columns)
        columns = {name: [example.columns.get(name) for example, _ in repeated] for name in names}
        columns["response_tokens"] = [len(c.token_ids) for _, c in repeated]
        tasks = [example.task for example, _ in repeated]
        scores = rewards.score([example.messages for example, _ in repeated], texts, tasks, columns)
        return scores, more

    def _answers(self, repeated: list[tuple[Prompt, Any]], responses: list[list[int]]):
        """Return what rewards read of each response, and columns of its thoughts where rollout.think_end_token is set."""
        texts, end = response_texts(responses, self.tokenizer, self.stop_token_ids), self.rollout.think_end_token
        if not end:
            return texts, {}
        begun = [thoughts.begun_in_prompt(example.prompt_ids, end, self.tokenizer) for example, _ in repeated]
        parted = thoughts.part(responses, texts, begun, end, self.tokenizer)
        columns = {"thought_tokens": parted.tokens, "unfinished_thoughts": parted.unfinished}
        return parted.answers, {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}

    def _gather(self, examples, samples, mine, completions, scores, scored: ScoredPrompts, more=None) -> Rollouts:
        """Gather all ranks' responses in the order of the prompts. more: further columns of this rank's responses."""
        flat = [c for group in completions for c in group]
        responses = (  # as tensors: pickled in bulk
            torch.tensor([len(c.token_ids) for c in flat], dtype=torch.int64),
            torch.tensor([token for c in flat for token in c.token_ids], dtype=torch.int32),
            torch.tensor([logprob for c in flat for logprob in c.logprobs], dtype=torch.float32),
            torch.tensor([c.truncated for c in flat], dtype=torch.bool),
            torch.tensor([len(ids) for c in flat for ids in c.kept or ()], dtype=torch.int64),
            torch.tensor([i for c in flat for ids in c.kept or () for i in ids], dtype=torch.int32),
        )
        tensors = {"reward": scores.total, **{f"reward/{name}": part for name, part in scores.parts.items()}} | (more or {})
        routes = [torch.from_numpy(c.routes) for c in flat if c.routes is not None]
        own = (mine, responses, tensors, torch.cat(routes) if routes else None, scores.failures, scores.said)
        everything = world.gather_objects(own)
        places = torch.tensor(
            [p for places, *_ in everything for p in places for _ in range(samples)], dtype=torch.int64
        )
        parts = zip(*[r for _, r, *_ in everything], strict=True)
        lengths, tokens, logprobs, truncated, counts, kept = map(torch.cat, parts)
        prompts = [examples[p] for p in places.tolist()]
        batch = SequenceBatch.from_lists(
            [p.prompt_ids for p in prompts],
            [ids.tolist() for ids in tokens.split(lengths.tolist())],
            group=places,
            task=torch.tensor([scored.tasks.index(p.task) for p in prompts]),
            truncated=truncated,
            **{name: torch.cat([t[name] for _, _, t, *_ in everything]) for name in tensors},
        )
        gathered = [each for _, _, _, each, *_ in everything if each is not None]
        if gathered:
            batch.routes = torch.cat(gathered)
        if counts.numel():
            batch.kept = KeptTokens(counts, kept)
        batch.columns |= _comparison(batch.columns, scored.rewards)
        batch.token_columns["rollout_logprobs"] = logprobs
        failures = _add_counts([f for *_, f, _ in everything])
        silent = {name for name in failures if batch.columns[f"reward/{name}"].isnan().all()}
        self._report_failures([said for *_, said in everything], silent)
        return Rollouts(batch.select(torch.argsort(places, stable=True)), scored.tasks, failures)

    def _report_failures(self, said: list[dict[str, dict[str, str]]], silent: set[str]) -> None:
        """Show a reward's first failure of each kind once, and again whenever it scored nothing; metrics count all."""
        for line in failure_lines(said, silent, self._reported):
            if world.rank() == 0:
                print(line, flush=True)

    def say_once(self, kind: str, text: str) -> None:
        """Print the first text of each kind, on rank 0."""
        if kind not in self._said and world.rank() == 0:
            print(text, flush=True)
        self._said.add(kind)

    @property
    def gap_limit(self) -> GapLimit:
        """Return the limit for the next comparison of log-probs."""
        precision = "fp8" if self.model.fp8 else self.model.precision
        return GapLimit.of(precision, self.measured.get("logprob_gap"), self.rollout.logprob_gap_threshold)

    def check_logprobs(self, step: int, batch: SequenceBatch, logprobs: Tensor) -> None:
        """Compare the policy's log-probs [R] of responses with those of vLLM when it sampled them. Raises RefitError.

        This is part of the check of every refit: the policy computes these numbers anyway before it changes again. The first
        comparison of a run measures the effect of rounding on its model.
        """
        rollout = batch.token_columns["rollout_logprobs"]
        gap = check_logprob_gap(rollout, logprobs, batch.response_lengths, step=step, limit=self.gap_limit)
        self.measured.setdefault("logprob_gap", gap[0])
        limit = self.gap_limit
        self.say_once(
            "log-prob gap",
            f"step {step}: vLLM's and the trainer's log-probs differ by {gap[0]:.3g} per token on average; the run stops where "
            f"their {limit.statistic} difference exceeds {limit.value:.3g} ({limit.origin})",
        )

    def close(self) -> None:
        """End the engine."""
        self.engine.close()

    def write_samples(self, path: Path, rollouts: Rollouts) -> None:
        """Write prompts, responses and rewards as JSON lines, for a reader."""
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = rollouts.batch
        pairs = batch.unpack()
        prompts = self.tokenizer.batch_decode([prompt for prompt, _ in pairs])
        responses = self.tokenizer.batch_decode([response for _, response in pairs])
        with path.open("w") as file:
            for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                row = {
                    "prompt": prompt,
                    "response": response,
                    "task": rollouts.tasks[int(batch.columns["task"][index])],
                }
                scores = {
                    name: batch.columns[name][index].item() for name in batch.columns if name.startswith("reward")
                }
                row |= {name: None if math.isnan(score) else score for name, score in scores.items()}
                file.write(json.dumps(row) + "\n")


def _comparison(columns: dict[str, Tensor], rewards: RewardSet) -> dict[str, Tensor]:
    """Return the columns compared and partly_scored, from those of the rewards. Failed rewards enter no mean."""
    parts = torch.stack([columns[f"reward/{reward.name}"] for reward in rewards.rewards], 1)
    parts[columns["reward"].isnan()] = math.nan
    weights = torch.tensor([reward.weight for reward in rewards.rewards], dtype=torch.float64)
    groups = columns["group"]
    return {"compared": compared_rewards(parts, weights, groups), "partly_scored": partly_scored(parts, groups)}


def response_texts(responses: list[list[int]], tokenizer, stop_token_ids: list[int]) -> list[str]:
    """Return the texts that rewards read: each response without the token that ended it. Tags such as <think>, which some
    tokenizers treat as special tokens, stay."""
    written = [ids[:-1] if ids[-1:] and ids[-1] in stop_token_ids else ids for ids in responses]
    return tokenizer.batch_decode(written, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def failure_lines(said: list[dict], silent: set[str], reported: set[tuple[str, str]]) -> list[str]:
    """Return the lines to print on a batch's failures. said: Scores.said of each rank. silent: the rewards that scored no
    response. reported: (reward, kind) of the failures printed before; this adds to it."""
    first: dict[tuple[str, str], str] = {}
    for name, kinds in (item for rank in said for item in rank.items()):
        for kind, text in kinds.items():
            first.setdefault((name, kind), text)
    told = [key for key in first if key not in reported or key[0] in silent]
    reported.update(told)
    share = {name: "all of its" if name in silent else "some" for name, _ in told}
    return [
        f"reward {name} failed for {share[name]} responses, which stay unscored. First {kind}: {first[name, kind]}"
        for name, kind in told
    ]


def sampling_seed(run_seed: int, step: int) -> int:
    """Return one seed per (run, step), so that a resumed run samples the same. The engine adds its index."""
    return run_seed << 32 | step


def _add_counts(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for per_reward in counts:
        for reward, kinds in per_reward.items():
            for kind, count in kinds.items():
                total.setdefault(reward, {}).setdefault(kind, 0)
                total[reward][kind] += count
    return total
