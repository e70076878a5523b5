"""Write the tokens that a step's loss leaves out because vLLM and the trainer disagree about them, for a reader:
run_dir/masked/step_N.jsonl. Their share is in the metrics."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from frpo_nemo.config.options import FRPORun
from frpo_nemo.data.batch import SequenceBatch, segment_ids
from frpo_nemo.objective.mismatch import agreement
from frpo_nemo.rollout.worker import RolloutWorker
from frpo_nemo.training.run import Run

MOST = 32  # most rows of a file


def save_masked(
    run: Run[FRPORun], worker: RolloutWorker, batch: SequenceBatch, trained: Tensor, step: int
) -> None:
    """Write the masked tokens of a step, if there are any, and print a line the first time. trained: log-probs [R] under
    the policy that sampled."""
    limit = run.cfg.rollout.token_gap_limit
    if run.rank or limit is None:
        return
    gaps = (trained - batch.token_columns["rollout_logprobs"]).abs()
    masked = (agreement(trained, batch.token_columns["rollout_logprobs"], limit) == 0).nonzero().flatten()
    if not len(masked):
        return
    path = run.dir / "masked" / f"step_{step:08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    largest_first = masked[gaps[masked].argsort(descending=True)]
    rows = masked_rows(batch, trained, largest_first[:MOST].tolist(), worker.tokenizer)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    worker.say_once(
        "masked tokens",
        f"step {step}: {len(masked)} of {len(trained)} tokens are left out of the loss: vLLM's and the trainer's log-probs "
        f"differ by more than rollout.token_gap_limit={limit:g} nats (by {gaps[masked].max():.1f} at most): {path}. "
        "rollout_mismatch/share_masked has the later steps.",
    )


def masked_rows(batch: SequenceBatch, trained: Tensor, places: list[int], tokenizer) -> list[dict]:
    """Return a row for each of the response tokens `places` (of [R]): its text, the text before it, and its log-probs."""
    lengths, sequences = batch.response_lengths, batch.unpack()
    owner = segment_ids(lengths)
    first = torch.cumsum(lengths, 0) - lengths
    rows = []
    for place in places:
        index = int(owner[place])
        position = place - int(first[index])
        prompt, response = sequences[index]
        row = {
            "sequence": index,
            "position": position,
            "token": tokenizer.decode(response[position]),
            "logprob_vllm": batch.token_columns["rollout_logprobs"][place].item(),
            "logprob_trainer": trained[place].item(),
        }
        if "reference_logprobs" in batch.token_columns:
            row["logprob_reference"] = batch.token_columns["reference_logprobs"][place].item()
        rows.append(
            row | {"prompt": tokenizer.decode(prompt), "response_before": tokenizer.decode(response[:position])}
        )
    return rows
