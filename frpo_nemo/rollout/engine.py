"""Run the vLLM engine in the same process as the policy, one of world / tensor_parallel_size engines.

Every rank of an engine calls every method with the same arguments: vLLM's external launcher runs one scheduler per
rank, and they stay in step because they see the same requests. vLLM is imported when an engine is made (seconds).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from frpo_nemo.errors import ConfigError
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.rollout import cpu_experts
from frpo_nemo.rollout.refit_check import WeightCheck, raise_on_all_ranks
from frpo_nemo.rollout.routes import RoutesRecorder
from frpo_nemo.rollout.sampling_masks import return_from_first_runner

DECODED_ROWS = 16  # as megatron.cpu.BF16_ROWS, but most steps decode few sequences


@dataclass(frozen=True, slots=True)
class Completion:
    """One response. token_ids: including the stop token that ended it, if any. logprobs: one per token, under the sampled
    distribution before top-p and top-k, or with sampling_masks after them; empty when `generate` was given another
    temperature. kept: with sampling_masks, the ids that top-p and top-k kept at each token. routes: with `routes`, the experts
    that were chosen for each token of prompt and response, [tokens, layers with experts, chosen]; any for the last token, which
    never went through the model."""

    token_ids: list[int]
    logprobs: list[float]
    truncated: bool  # max_tokens came before a stop token
    kept: list[list[int]] | None = None
    routes: np.ndarray | None = None


class RolloutEngine:
    """Sample with vLLM, refitted from the policy. torch.distributed must be initialised before, also for one process."""

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str,
        max_model_len: int,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.6,
        max_num_seqs: int = 256,
        enforce_eager: bool | None = None,
        fp32_logits: bool = False,
        temperature: float = 1.0,
        sampling_masks: bool = False,
        routes: bool = False,
        load_format: str = "dummy",
    ):
        """Start vLLM. dtype: "float32" or "bfloat16". max_model_len: prompt and response, in tokens. fp32_logits: as in a
        ModelConfig, whatever config.json has (head_dtype). temperature: for rollouts; their log-probs are those of
        softmax(logits / temperature), or at 0 (greedy) of softmax(logits). enforce_eager: no CUDA graphs, or on a CPU no
        compiled model; None: graphs on a GPU, eager on a CPU. sampling_masks: return which tokens top-p and
        top-k kept, and log-probs among these. routes: return which experts were chosen. load_format: "dummy" leaves the
        weights to the first refit; "auto" loads the checkpoint at `model_path`. Raises ConfigError for a layout that does
        not fit.
        """
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed must be initialised before a RolloutEngine, also in a world of one")
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % tensor_parallel_size:
            raise ConfigError(
                f"rollout.tensor_model_parallel_size={tensor_parallel_size} does not divide the {world} processes"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"the rollout engine's dtype is {dtype!r}; it must be float32 or bfloat16")
        self.num_engines = world // tensor_parallel_size
        self.engine_index = rank // tensor_parallel_size
        self._dtype = getattr(torch, dtype)
        self._temperature, self._max_model_len = temperature, max_model_len
        self._sampling_masks, self._routes = sampling_masks, routes
        self._on_gpu = torch.cuda.is_available()
        self._eager = not self._on_gpu if enforce_eager is None else enforce_eager
        self._asleep: set[str] = set()
        self._has_weights = load_format != "dummy"
        if routes and self._on_gpu:
            _return_routes_on_every_rank()
        with _quiet(), isolated_rng(0):  # vLLM seeds all global generators when it starts
            self._llm = _start_vllm(
                self.engine_index,
                model=model_path,
                dtype=dtype,
                tensor_parallel_size=tensor_parallel_size,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                gpu_memory_utilization=gpu_memory_utilization,
                enforce_eager=self._eager,
                enable_sleep_mode=self._on_gpu,
                hf_overrides={"head_dtype": "float32" if fp32_logits else "model"},
                load_format=load_format,
                # "raw" is before the temperature, "processed" after; at temperature 1 raw does not copy the logits.
                logprobs_mode="raw_logprobs" if temperature == 1 and not sampling_masks else "processed_logprobs",
                return_sampling_mask=sampling_masks and self._on_gpu,
                enable_return_routed_experts=routes and self._on_gpu,
                # Others of vLLM's kernels for experts rearrange the weights, which could then not be verified.
                moe_backend="triton" if self._on_gpu else "auto",
            )
        if sampling_masks and not self._on_gpu:
            return_from_first_runner(self._llm)
        self._recorder = RoutesRecorder(self._llm) if routes and not self._on_gpu else None
        if routes:  # vLLM has zeros for other layers
            self._layers_with_experts = np.flatnonzero(Architecture.from_hf(model_path).experts.layers)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        seed: int,
        stop_token_ids: Sequence[int],
        samples: int = 1,
        temperature: float | None = None,
        top_p: float = 1.0,
        top_k: int = -1,
    ) -> list[list[Completion]]:
        """Return `samples` responses to each prompt (token ids), in the order of the prompts.

        The same weights, arguments and engine layout give the same tokens and log-probs, bit for bit, in any process:
        sampling draws from generators seeded with (seed, engine_index), and no prefix cache survives between calls.
        The process's own random state does not change. temperature: None is the engine's; at another one (0 is
        greedy) no log-probs are returned.
        """
        from vllm import SamplingParams

        rollout = temperature is None or temperature == self._temperature
        self._check_request(prompts, max_tokens, rollout and (top_p < 1 or top_k > 0))
        self._wake("weights", "kv_cache")
        self._forget_prefixes()
        if self._sampling_masks and self._on_gpu and top_k <= 0:
            top_k = self._llm.model_config.get_vocab_size()  # vLLM returns masks only where there is a top_k
        params = SamplingParams(
            n=samples,
            temperature=self._temperature if temperature is None else temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_tokens,
            stop_token_ids=list(stop_token_ids),
            ignore_eos=True,  # else those of generation_config.json end a response too, not only the caller's
            detokenize=False,
            logprobs=0 if rollout else None,  # 0: only of the sampled token
            flat_logprobs=True,
        )
        seed = int(np.random.SeedSequence((seed, self.engine_index)).generate_state(1)[0])
        with isolated_rng(seed), self._without_compiling():
            requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            outputs = self._llm.generate(requests, params, use_tqdm=False) if requests else []
        masked = rollout and self._sampling_masks
        completions = [[_completion(response, rollout, masked) for response in output.outputs] for output in outputs]
        return self._with_routes(prompts, completions, outputs) if self._routes else completions

    @torch.no_grad()
    def refit(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights by a stream of (Hugging Face name, full tensor), the same on every rank of the engine,
        and verify that they arrived. Collective over the world; `weights` is always consumed to its end, because
        collectives may produce it. Raises RefitError, on every rank, naming rank and tensors.
        """
        self._wake("weights")
        check = WeightCheck(self._model(), self._dtype)
        stream = check.watch(weights)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": stream})
        for _ in stream:
            pass
        self._forget_prefixes()
        problems = check.problems()
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise_on_all_ranks(f"after the refit, {shown}" if problems else None)
        self._has_weights = True

    def sleep(self) -> None:
        """Free the GPU memory of weights and KV cache until `refit` (weights only) or `generate` needs it.

        Level 1 keeps the weights in host memory. Level 2 would drop them, because every refit sends them again, but it also
        drops what a model keeps outside of parameters and buffers, which comes back as garbage. Does nothing on a CPU.
        """
        if self._on_gpu and not self._asleep:
            self._llm.sleep(level=1)
            self._asleep = {"weights", "kv_cache"}

    def wake(self) -> None:
        """Undo `sleep` now. `refit` and `generate` wake what they need themselves."""
        self._wake("weights", "kv_cache")

    def close(self) -> None:
        """Shut vLLM down. This also destroys torch.distributed's process groups, so it comes last."""
        self._llm.llm_engine.engine_core.shutdown()

    def _wake(self, *tags: str) -> None:
        if needed := self._asleep.intersection(tags):
            self._llm.wake_up(tags=sorted(needed))
            self._asleep -= needed

    def _forget_prefixes(self) -> None:
        """Reset the prefix cache: its keys and values belong to old weights, and hits change the last bits of results."""
        if self._recorder:
            self._recorder.forget()
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests of an earlier call are still running")

    def _with_routes(self, prompts, completions: list[list[Completion]], outputs) -> list[list[Completion]]:
        """Add the chosen experts to the responses. The last token was never an input: it gets any experts."""
        recorded = self._recorder.collect() if self._recorder else None
        found: list[list[Completion]] = []
        for prompt, group, output in zip(prompts, completions, outputs, strict=True):
            found.append([])
            for completion, response in zip(group, output.outputs, strict=True):
                fed = np.array([*prompt, *completion.token_ids[:-1]], np.int32)
                routes = recorded[fed.tobytes()] if recorded else response.routed_experts[:, self._layers_with_experts]
                if routes.dtype == np.uint16:  # torch can hardly compute with it
                    routes = routes.astype(np.int16)
                any_experts = np.broadcast_to(np.arange(routes.shape[2], dtype=routes.dtype), (1, *routes.shape[1:]))
                found[-1].append(replace(completion, routes=np.concatenate([routes, any_experts])))
        return found

    def _model(self) -> torch.nn.Module:
        return self._llm.apply_model(lambda model: model)[0]

    def _without_compiling(self) -> contextlib.AbstractContextManager:
        """Avoid a useless compilation: on a CPU vLLM's sampler compiles one small function at the first call (2 s, C++)."""
        useless = self._eager and not self._on_gpu
        return torch.compiler.set_stance("force_eager") if useless else contextlib.nullcontext()

    def _check_request(self, prompts: Sequence[Sequence[int]], max_tokens: int, truncated_sampling: bool) -> None:
        if not self._has_weights:
            raise RuntimeError("generate() before the first refit: the engine was started without weights")
        if truncated_sampling and self._temperature != 1 and not self._sampling_masks:
            raise ConfigError(
                f"rollout.temperature={self._temperature} together with top_p or top_k: vLLM then gives log-probs of "
                "the truncated distribution. Use temperature=1 with them, or top_p=1 and top_k=-1."
            )
        longest = max((len(prompt) for prompt in prompts), default=0)
        if longest + max_tokens > self._max_model_len:
            raise ConfigError(
                f"a prompt of {longest} tokens and {max_tokens} tokens of response do not fit into "
                f"max_model_len={self._max_model_len}"
            )


def _return_routes_on_every_rank() -> None:
    """Let every rank of an engine collect the chosen experts. vLLM lets the first alone, for one scheduler; here each rank has
    its own, which would miss them."""
    from vllm.distributed.aux_output_connector import worker

    worker.get_tp_group = lambda: SimpleNamespace(is_first_rank=True)


def _completion(response, with_logprobs: bool, masked: bool) -> Completion:
    logprobs = response.logprobs.logprobs if with_logprobs else []
    kept = response.sampling_mask.token_ids if masked else None
    return Completion(list(response.token_ids), logprobs, response.finish_reason == "length", kept)


def _start_vllm(engine_index: int, **settings):
    """Return the LLM of this rank. Environment variables that the user set stay as they are."""
    rank, caches = str(dist.get_rank()), Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, as external_launcher requires
        "VLLM_PLUGINS": "",  # nemo-toolkit registers one that isn't needed
        "VLLM_LOGGING_LEVEL": "ERROR",  # many warnings on a CPU, none of which needs action here
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB per rank; only what is used is allocated
        # Engines that start together would compile into the same files.
        "VLLM_CACHE_ROOT": str(caches / "vllm" / f"engine_{engine_index}"),
        "RANK": rank,
        "LOCAL_RANK": rank,
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # vLLM sets it only after its first messages
    from vllm import LLM

    gc.freeze()  # objects of imports; vLLM collects garbage three times while it loads
    with contextlib.nullcontext() if torch.cuda.is_available() else _cpu_workarounds():
        return LLM(
            distributed_executor_backend="external_launcher",
            trust_remote_code=False,
            skip_tokenizer_init=True,  # token ids in, token ids out
            generation_config="vllm",  # no sampling settings of the checkpoint's file; stop tokens: see ignore_eos
            enable_prefix_caching=True,  # the responses of one group share their prompt
            use_tqdm_on_load=False,
            async_scheduling=False,  # otherwise generate() may return while a batch is still queued
            **settings,
        )


@contextlib.contextmanager
def _cpu_workarounds() -> Iterator[None]:
    """Start vLLM on a CPU with weights that can be read and with shared memory of this run only.

    vLLM packs linear weights into oneDNN or AMX objects and drops the parameters, so the weights that the engine computes
    with can't be read. Plain `linear` on live parameters makes every refit verifiable; it cost 5% (fp32) to 20% (bf16)
    of generation with a tiny model, before bf16 rows were rounded up.

    The ranks of a tensor-parallel engine exchange tensors through segments in /dev/shm, which vLLM names after the
    rendezvous, "env://": the same in every job. A second job, or one after a killed one, would find them taken. Here the
    names are unique to this run, and are removed when all ranks have mapped them, so that no process leaves them behind.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.model_executor.layers import utils

    def keep_weight(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = _linear

    name_after_rendezvous = _CPUSHMDistributed.make_group_name
    run = [f"frpo-{uuid.uuid4().hex[:12]}"]
    dist.broadcast_object_list(run, src=0)
    utils.dispatch_cpu_unquantized_gemm = keep_weight  # not restored: refits call it too
    cpu_experts.install()
    _CPUSHMDistributed.make_group_name = staticmethod(lambda group: run[0] + name_after_rendezvous(group).lstrip("/"))
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(name_after_rendezvous)
    dist.barrier()
    for segment in Path("/dev/shm").glob(f"{run[0]}*"):
        segment.unlink(missing_ok=True)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [..., H] times weight^T [H, O], in bf16 with a number of rows that was probably seen before (cpu.BF16_ROWS)."""
    if x.dtype != torch.bfloat16:
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % DECODED_ROWS))
    return torch.nn.functional.linear(padded, weight, bias)[: len(rows)].unflatten(0, x.shape[:-1])


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Start all global generators at `seed` (below 2**32), and restore them afterwards. vLLM samples from torch's
    (model runner V1) or takes the seeds of requests from numpy's (V2)."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of vLLM's imports, which concern its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
