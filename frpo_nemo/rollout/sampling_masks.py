"""Let vLLM return, for each token it samples, the tokens that top-k and top-p had kept.

Model runner V2 does it (return_sampling_mask), but needs Triton. On a CPU vLLM has only its first runner: there this module
takes the kept tokens out of the sampler, and hands them to the scheduler, which knows what to do with them.
"""

from __future__ import annotations

from typing import Any

import torch


def return_from_first_runner(llm: Any) -> None:
    """Change this process's engine, which must run in it and have logprobs_mode="processed_logprobs". Its requests must all
    sample at random: a step of greedy ones alone does not pass through the sampler that is changed here."""
    from vllm.v1.outputs import SamplingMaskLists

    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    sampler = runner.sampler.topk_topp_sampler
    forward, step = sampler.forward, runner.sample_tokens
    kept: list[torch.Tensor] = []  # of the step's rows, one for each request in the runner's order

    def forward_and_keep(*arguments, **keywords):
        sampled, logprobs = forward(*arguments, **keywords)
        kept[:] = [logprobs > float("-inf")]
        return sampled, logprobs

    def sample_tokens(*arguments, **keywords):
        kept.clear()
        output = step(*arguments, **keywords)
        if kept:
            [rows] = kept
            offsets = torch.nn.functional.pad(rows.sum(dim=1).cumsum(0), (1, 0))
            ids = rows.nonzero()[:, 1].to(torch.int32)
            output.sampling_masks = SamplingMaskLists(ids.numpy(), offsets.numpy())
        return output

    sampler.forward, runner.sample_tokens = forward_and_keep, sample_tokens
    core.scheduler.return_sampling_mask = True
