"""Rollouts of a step: prompts through the colocated vLLM engines and the rewards, as one global ragged batch.

Every engine generates whole groups for its share of the prompts; the ranks of an engine share the scoring; the
results (token ids, small) are gathered on every rank, in the order of the prompts.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.data.prompts import Prompt, PromptSampler, load_prompts
from frpo_nemo.megatron import distributed
from frpo_nemo.megatron.actor import PolicyActor
from frpo_nemo.rewards.reward_set import build_rewards
from frpo_nemo.rollout.engine import RolloutEngine
from frpo_nemo.rollout.verify import check_logprob_gap

VALIDATION = 1 << 31  # takes the step's place in sampling seeds, so that validation never shares training's randomness


@dataclass
class Rollouts:
    """A step's responses: `batch` has the columns group, task (index into tasks), truncated, reward and reward/NAME
    (NaN: unscored), and the token column rollout_logprobs. failures: reward -> kind -> count."""

    batch: SequenceBatch
    failures: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        return self.batch.columns["reward"]

    @property
    def groups(self) -> Tensor:
        return self.batch.columns["group"]


class RolloutWorker:
    """This rank's engine, prompts and rewards."""

    def __init__(self, cfg, phases):
        """cfg: FRPORun. torch.distributed runs; Megatron's model does not exist yet (vLLM measures free memory)."""
        rollout = cfg.rollout
        self.cfg, self.phases = cfg, phases
        self.tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
        limit = dict(max_prompt_tokens=cfg.data.max_prompt_tokens)
        self.prompts = load_prompts(cfg.data.train, self.tokenizer, **limit)
        self.validation = load_prompts(cfg.data.validation, self.tokenizer, **limit) if cfg.data.validation else None
        self.tasks = sorted(self.prompts.tasks | (self.validation.tasks if self.validation else set()), key=str)
        self.rewards = build_rewards(cfg.reward)
        self.rewards.check_tasks(set(self.tasks))
        self.sampler = PromptSampler(len(self.prompts), rollout.prompts_per_step, cfg.trainer.seed, cfg.data.shuffle)
        self.stop_token_ids = stop_token_ids(cfg.model.path, self.tokenizer)
        self.engine = RolloutEngine(
            cfg.model.path,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[cfg.model.precision],
            tensor_parallel_size=rollout.tensor_model_parallel_size,
            max_model_len=cfg.data.max_prompt_tokens + rollout.max_response_tokens,
            gpu_memory_utilization=rollout.gpu_memory_utilization,
            max_num_seqs=rollout.max_num_seqs,
            enforce_eager=rollout.enforce_eager,
            temperature=rollout.temperature,
        )
        self.engine.sleep()  # the policy is built next
        self._reported: set[str] = set()

    def fingerprints(self) -> dict[str, str]:
        """Of the data sets, for the checkpoints."""
        sets = {"train": self.prompts, "validation": self.validation}
        return {name: s.fingerprint for name, s in sets.items() if s is not None}

    def generate(self, step: int, actor: PolicyActor) -> Rollouts:
        """G responses to each of the step's prompts."""
        examples = [self.prompts.examples[i] for i in self.sampler.indices(step - 1)]
        return self._roll_out(examples, self.cfg.rollout.group_size, step, actor)

    def validate(self, step: int, actor: PolicyActor) -> Rollouts:
        """One response to each held-out prompt, sampled as in training, with the same randomness at every step."""
        return self._roll_out(self.validation.examples, 1, VALIDATION, actor)

    def refit(self, actor: PolicyActor) -> None:
        """Send the policy's weights to the engine and check that they arrived. Raises RefitError."""
        with self.phases("refit"):
            actor.finish_training()  # the optimizer's GPU memory is vLLM's until the next update
            self.engine.refit(actor.stream_hf_weights(bucket_bytes=self.cfg.rollout.refit_bucket_mb << 20))

    def _roll_out(self, examples: list[Prompt], samples: int, seed_step: int, actor: PolicyActor) -> Rollouts:
        with self.phases("generate"):
            mine, completions = self._generate_share(examples, samples, seed_step)
            self.engine.sleep()
            distributed.wait_for_all()  # generation ends with the slowest engine, and its time is told so
        with self.phases("reward"):
            scores = self._score([examples[i] for i in mine], completions)
        with self.phases("gather"):
            rollouts = self._gather(examples, samples, mine, completions, scores)
        if rollouts.rewards.isnan().all():
            raise RuntimeError(
                f"None of {len(rollouts.rewards)} responses could be scored; the rewards failed as shown above."
            )
        return rollouts

    def _generate_share(self, examples, samples: int, seed_step: int):
        """(places of the prompts whose responses this rank scores, their responses)."""
        engine, rollout = self.engine, self.cfg.rollout
        share = range(engine.engine_index, len(examples), engine.num_engines)
        generated = engine.generate(
            [examples[i].prompt_ids for i in share],
            samples=samples,
            max_tokens=rollout.max_response_tokens,
            seed=sampling_seed(self.cfg.trainer.seed, seed_step),
            stop_token_ids=self.stop_token_ids,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
        )
        rank, size = distributed.rank() % rollout.tensor_model_parallel_size, rollout.tensor_model_parallel_size
        return list(share)[rank::size], generated[rank::size]

    def _score(self, examples: list[Prompt], completions: list[list]):
        repeated = [(example, c) for example, group in zip(examples, completions, strict=True) for c in group]
        texts = self.tokenizer.batch_decode([c.token_ids for _, c in repeated], skip_special_tokens=True)
        names = dict.fromkeys(name for example in examples for name in example.columns)
        columns = {name: [example.columns.get(name) for example, _ in repeated] for name in names}
        columns["response_tokens"] = [len(c.token_ids) for _, c in repeated]
        tasks = [example.task for example, _ in repeated]
        return self.rewards.score([example.messages for example, _ in repeated], texts, tasks, columns)

    def _gather(self, examples, samples, mine, completions, scores) -> Rollouts:
        """All ranks' responses in the order of the prompts."""
        flat = [c for group in completions for c in group]
        tensors = {"reward": scores.total, **{f"reward/{name}": part for name, part in scores.parts.items()}}
        own = (mine, [(c.token_ids, c.logprobs, c.truncated) for c in flat], tensors, scores.failures, scores.messages)
        everything = distributed.gather_objects(own)
        places = torch.tensor(
            [p for places, *_ in everything for p in places for _ in range(samples)], dtype=torch.int64
        )
        responses = [r for _, rows, *_ in everything for r in rows]
        self._report_failures({name: text for *_, messages in everything for name, text in messages.items()})
        prompts = [examples[p] for p in places.tolist()]
        batch = SequenceBatch.from_lists(
            [p.prompt_ids for p in prompts],
            [ids for ids, _, _ in responses],
            group=places,
            task=torch.tensor([self.tasks.index(p.task) for p in prompts]),
            truncated=torch.tensor([truncated for _, _, truncated in responses]),
            **{name: torch.cat([t[name] for _, _, t, *_ in everything]) for name in tensors},
        )
        batch.token_columns["rollout_logprobs"] = torch.tensor([x for _, logprobs, _ in responses for x in logprobs])
        return Rollouts(batch.select(torch.argsort(places, stable=True)), _add_counts([f for *_, f, _ in everything]))

    def _report_failures(self, messages: dict[str, str]) -> None:
        """Show each reward's first failure once; metrics count all."""
        for name, text in messages.items():
            if name not in self._reported and distributed.rank() == 0:
                print(f"reward {name} failed for some responses, which stay unscored. First: {text}", flush=True)
            self._reported.add(name)

    def check_logprobs(self, step: int, batch: SequenceBatch, logprobs: Tensor) -> None:
        """Compare the policy's log-probs [R] of responses with those that vLLM sampled them with. Raises RefitError.

        Part of every refit's proof: the policy computes these numbers anyway before it changes again.
        """
        check_logprob_gap(
            batch.token_columns["rollout_logprobs"],
            logprobs,
            batch.response_lengths,
            step=step,
            precision=self.cfg.model.precision,
            threshold=self.cfg.rollout.logprob_gap_threshold,
        )

    def close(self) -> None:
        """End reward workers and the engine."""
        self.rewards.close()
        self.engine.close()

    def write_samples(self, path: Path, rollouts: Rollouts) -> None:
        """Prompts, responses and rewards as JSON lines, to read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        batch = rollouts.batch
        pairs = batch.unpack()
        prompts = self.tokenizer.batch_decode([prompt for prompt, _ in pairs])
        responses = self.tokenizer.batch_decode([response for _, response in pairs])
        with path.open("w") as file:
            for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                row = {"prompt": prompt, "response": response, "task": self.tasks[int(batch.columns["task"][index])]}
                scores = {
                    name: batch.columns[name][index].item() for name in batch.columns if name.startswith("reward")
                }
                row |= {name: None if math.isnan(score) else score for name, score in scores.items()}
                file.write(json.dumps(row) + "\n")


def stop_token_ids(model_path: str, tokenizer) -> list[int]:
    """The tokenizer's EOS and those of generation_config.json (Llama 3 ends a turn with another token)."""
    ids = {tokenizer.eos_token_id}
    if Path(model_path, "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(model_path).eos_token_id
        ids |= set(more if isinstance(more, list) else [more]) - {None}
    return sorted(ids)


def sampling_seed(run_seed: int, step: int) -> int:
    """One seed per (run, step), so that a resumed run draws what the first would have drawn. The engine adds its index."""
    return run_seed << 32 | step


def _add_counts(counts: list[dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for per_reward in counts:
        for reward, kinds in per_reward.items():
            for kind, count in kinds.items():
                total.setdefault(reward, {}).setdefault(kind, 0)
                total[reward][kind] += count
    return total
