"""Let vLLM return which experts it chose for every token.

Model runner V2 does it (enable_return_routed_experts), but needs Triton. On a CPU vLLM has only its first runner: there this
module records the routers' choices, and finds those of a response by its tokens. A prefix that came from vLLM's cache was
computed for another request, so recorded prefixes are kept for as long as the cache: until `forget`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass
class _Request:
    """What is known of a request. tokens: int32 [longest], routes: [longest, layers, chosen], of which `length` are filled."""

    tokens: np.ndarray
    routes: np.ndarray
    length: int = 0


class RoutesRecorder:
    """The choices of this process's engine, which must run in it."""

    def __init__(self, llm: Any):
        from vllm.model_executor.layers.fused_moe import MoERunner

        config = llm.llm_engine.vllm_config
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        experts = [module for module in runner.model.modules() if isinstance(module, MoERunner)]
        moe = experts[0].moe_config
        self._longest, self._block = config.model_config.max_model_len, config.cache_config.block_size
        self._shape = (len(experts), moe.experts_per_token)
        self._dtype = np.uint8 if moe.num_experts <= 256 else np.int16
        # What the routers chose in a step, by the rows of its batch.
        self._step = torch.zeros(config.scheduler_config.max_num_batched_tokens, *self._shape, dtype=torch.int16)
        self._requests: dict[str, _Request] = {}
        self._prefixes: dict[bytes, np.ndarray] = {}  # tokens of whole blocks -> their routes
        for place, module in enumerate(experts):
            module.router.set_capture_fn(lambda chosen, place=place: self._step[: len(chosen), place].copy_(chosen))
        self._watch(runner)

    def forget(self) -> None:
        """Drop everything, with vLLM's prefix cache."""
        self._requests.clear()
        self._prefixes.clear()

    def collect(self) -> dict[bytes, np.ndarray]:
        """Return tokens that went through the model (int32, as bytes) -> routes [tokens, layers, chosen], and drop requests."""
        found = {r.tokens[: r.length].tobytes(): r.routes[: r.length] for r in self._requests.values()}
        self._requests.clear()
        return found

    def _watch(self, runner) -> None:
        execute = runner.execute_model

        def execute_model(scheduled, *arguments, **keywords):
            output = execute(scheduled, *arguments, **keywords)
            self._record(runner.input_batch, scheduled.num_scheduled_tokens)
            return output

        runner.execute_model = execute_model

    def _record(self, batch, scheduled: dict[str, int]) -> None:
        step = self._step[: sum(scheduled.values())].numpy().astype(self._dtype)
        ends = np.cumsum([scheduled.get(name, 0) for name in batch.req_ids]).tolist()
        # Known requests first: a new one may begin with blocks that one of them fills in this very step.
        for index in sorted(range(len(ends)), key=lambda i: batch.req_ids[i] not in self._requests):
            name, end = batch.req_ids[index], ends[index]
            count, start = scheduled.get(name, 0), int(batch.num_computed_tokens_cpu[index])
            self._add(name, batch.token_ids_cpu[index, : start + count], start, step[end - count : end])

    def _add(self, name: str, tokens: np.ndarray, start: int, routes: np.ndarray) -> None:
        request = self._requests.get(name)
        if request is None:
            empty = np.zeros(self._longest, np.int32), np.zeros((self._longest, *self._shape), self._dtype)
            request = self._requests[name] = _Request(*empty)
        if start > request.length:  # it begins with a prefix from the cache
            request.routes[:start] = self._prefixes[tokens[:start].astype(np.int32).tobytes()]
        request.length = start + len(routes)
        request.tokens[: request.length] = tokens
        request.routes[start : request.length] = routes
        for end in range((start // self._block + 1) * self._block, request.length + 1, self._block):
            self._prefixes.setdefault(request.tokens[:end].tobytes(), request.routes[:end])
