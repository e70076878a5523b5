"""Train the policy: forward, backward and update on megatron-core, over packed microbatches in any layout.

Every method takes the *global* batch, equal on all ranks, and returns results in its order on all ranks. The names
follow NeMo-Aligner. A loss is a plain function (see `Loss`) of log-probs; it returns summands of a global sum, so the
result does not depend on how the batch is cut into microbatches, replicas or stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from frpo_nemo.config.options import ModelConfig, OptimizerConfig
from frpo_nemo.data.batch import SequenceBatch, ragged_positions
from frpo_nemo.megatron import groups, lora, optimizer, packing, routing, weight_decay
from frpo_nemo.megatron.architecture import Architecture
from frpo_nemo.megatron.cpu import BF16_ROWS, runs_on_megatron_device, without_device_mapping
from frpo_nemo.megatron.logprobs import token_kl, token_logprobs
from frpo_nemo.megatron.model import DTYPES, build_model, output_weight
from frpo_nemo.megatron.reference import Reference
from frpo_nemo.megatron.weights import adapter_files
from frpo_nemo.megatron.weights.export import stream_hf_weights
from frpo_nemo.megatron.weights.load import load_hf_weights
from frpo_nemo.processes import world
from frpo_nemo.stack import uses_transformer_engine


@dataclass
class Losses:
    """The result of a loss function for a microbatch: each sequence's summand [N] of the global loss, and columns
    without gradient for the caller's statistics, per sequence [N] and per response token [R]."""

    losses: Tensor
    per_sequence: dict[str, Tensor] = field(default_factory=dict)
    per_token: dict[str, Tensor] = field(default_factory=dict)


# (logprobs fp32 [R], entropy fp32 [R], the microbatch's sequences with their columns) -> Losses
Loss = Callable[[Tensor, Tensor, SequenceBatch], Losses]
# Hidden states that predict a microbatch's response tokens [t, H], equal on all TP ranks -> more columns [t]. See Microbatch
# for the last ones, which may be repeated.
Observe = Callable[[Tensor], dict[str, Tensor]]


class NonFiniteLoss(RuntimeError):
    """A loss or gradient is NaN or infinite. The weights are unchanged. `sequences`: indices in the global batch whose
    loss is not finite (empty if only the gradient is)."""

    def __init__(self, message: str, sequences: list[int]):
        super().__init__(message)
        self.sequences = sequences


@dataclass
class StepResult:
    """Columns in the order of the global batch: the loss's, and "loss" [N], "logprobs" and "entropy" [R]."""

    per_sequence: dict[str, Tensor]
    per_token: dict[str, Tensor]
    grad_norm: float
    learning_rate: float


class PolicyActor:
    """Model, optimizer and reference of this rank."""

    def __init__(
        self,
        model: ModelConfig,
        optim: OptimizerConfig | None = None,
        *,
        microbatch_tokens: int,
        temperature: float = 1.0,
        seed: int = 1,
    ):
        """Build model and optimizer. optim: None for inference only.
        temperature: log-probs are those of softmax(logits / temperature). seed: for new adapters."""
        self.arch = Architecture.from_hf(model.path)
        self.config, self.optim = model, optim
        self.microbatch_tokens, self.temperature = microbatch_tokens, temperature
        self.device = world.device()
        # Digest of the base as it is read here, even if the files change later.
        self.adapter_record = adapter_files.record(model)
        self.gpt = build_model(self.arch, model).to(self.device)
        load_hf_weights(self.gpt, self.arch, model.path)
        lora.initialise_adapters(self.gpt, self.arch, seed)
        self.ddp: DistributedDataParallel | None = None
        self.optimizer: MegatronOptimizer | None = None
        self.decayed = weight_decay.MATRICES
        self.reference: Reference | None = None  # of full training
        self._offloaded = False
        self._passes = 0  # training passes since take_expert_load
        if optim is not None:
            self._set_up_training()

    # -- training

    def train_step(self, batch: SequenceBatch, loss: Loss, *, update: int, total_updates: int) -> StepResult:
        """Compute the gradient of the sum of all sequences' losses, then do one optimizer update (number `update` from 0).
        Raises NonFiniteLoss before the update."""
        return self.optimizer_step(*self.accumulate_gradient(batch, loss), update=update, total_updates=total_updates)

    @runs_on_megatron_device
    def accumulate_gradient(self, batch: SequenceBatch, loss: Loss) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leave d(sum of losses)/d(weights), summed over the world, in the gradient buffers; returns the columns per
        sequence and per token."""
        self._passes += 1
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(batch, loss, forward_only=False)

    @runs_on_megatron_device
    def optimizer_step(
        self, per_sequence: dict[str, Tensor], per_token: dict[str, Tensor], *, update: int, total_updates: int
    ) -> StepResult:
        """Do one update (number `update` from 0) with the gradient of `accumulate_gradient`, which returned these columns.
        Raises NonFiniteLoss before it when a loss or the gradient is not finite."""
        bad = (~torch.isfinite(per_sequence["loss"])).nonzero().flatten().tolist()
        if bad:
            count = per_sequence["loss"].numel()
            raise NonFiniteLoss(f"the loss of {len(bad)} of {count} sequences is not finite", bad)
        rate = optimizer.learning_rate(update, total_updates, self.optim)
        try:
            norm = optimizer.step(self.optimizer, rate, self.optim.clip_grad)
        except optimizer.NonFiniteGradient as error:
            raise NonFiniteLoss(f"{error}, although every loss is finite", []) from None
        return StepResult(per_sequence, per_token, norm, rate)

    def decay(self, rule: str) -> None:
        """Decay the parameters that `rule` (see weight_decay.py) names, from the next update on."""
        self.decayed = rule
        weight_decay.apply(self.optimizer, self.optim.weight_decay, rule)

    def take_expert_load(self) -> routing.ExpertLoad | None:
        """Return how the training passes since the last call loaded the experts; None for a dense model. Collective."""
        passes, self._passes = self._passes, 0
        return routing.take_load(self.gpt, self.arch, passes) if self.arch.experts else None

    def get_forward_output_and_loss_func(self, loss: Loss | None, observe: Observe | None, sequences: int):
        """Return megatron-core's forward step: (microbatch iterator, model) -> (hidden states, function to the loss).
        sequences: of the global batch."""

        def forward_step(microbatches, model):
            microbatch = next(microbatches)
            routing.begin_pass(self.gpt, microbatch, sequences)
            with without_device_mapping():
                hidden = model(microbatch.tokens, microbatch.position_ids, None, packed_seq_params=microbatch.packed)
            return hidden, partial(self._loss_of_hidden, microbatch, loss, observe)

        return forward_step

    # -- inference

    @torch.no_grad()
    def get_inference_log_probs(self, batch: SequenceBatch) -> Tensor:
        """Return the log-probs of all response tokens under the current policy: fp32 [R], on CPU."""
        return self.get_inference_columns(batch)["logprobs"]

    @torch.no_grad()
    def get_inference_columns(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Return columns of all response tokens under the current policy, fp32 [R] on CPU: logprobs, entropy, and likeliest,
        which is 1 where greedy decoding would have chosen the token too."""
        self.prepare_for_inference()
        return self._infer(batch)

    def get_init_policy_logprobs(self, batch: SequenceBatch) -> Tensor:
        """Return the log-probs under the reference, fp32 [R]."""
        with self._as_reference():
            return self.get_inference_log_probs(batch)

    def freeze_reference(self) -> None:
        """Keep a copy of the current weights, on CPU, as the reference policy. With adapters their base is the reference, and
        nothing is copied."""
        if not self.config.lora.rank:
            self.reference = Reference(self.gpt)

    def update_reference(self, mix: float) -> None:
        """Make the reference mix * policy + (1 - mix) * reference. Checkpoints hold it from then on."""
        self.reference.update(self.gpt, mix)

    @torch.no_grad()
    def compare_with_reference(self, batch: SequenceBatch) -> dict[str, Tensor]:
        """Return columns [R] of the current policy on all response tokens, on CPU: logprobs, reference_logprobs, and kl, the
        exact KL from the reference of the next-token distribution. Summed over a response that the policy sampled, kl is
        an unbiased estimate of the KL of whole responses, with less variance than the log-ratio."""
        self.prepare_for_inference()
        kept: list[Tensor] = []  # the reference's hidden states, microbatch by microbatch

        def keep(hidden: Tensor) -> dict[str, Tensor]:
            kept.append(hidden.cpu())
            return {}

        with self._as_reference():
            reference = self._infer(batch, keep)["logprobs"]
            reference_weight = output_weight(self.gpt).clone() if kept else None
        pending = iter(kept)

        def compare(hidden: Tensor) -> dict[str, Tensor]:
            ref_hidden = next(pending).to(self.device)
            own_weight = output_weight(self.gpt)
            return {"kl": token_kl(hidden, own_weight, ref_hidden, reference_weight, **self._softmax_options())}

        columns = self._infer(batch, compare)
        return {"logprobs": columns["logprobs"], "reference_logprobs": reference, "kl": columns["kl"]}

    def stream_hf_weights(self, dtype: torch.dtype | None = None, bucket_bytes: int = 512 << 20):
        """Yield (Hugging Face name, full tensor) of every weight, the same on every rank; a collective."""
        return stream_hf_weights(self.gpt, self.arch, dtype=dtype, bucket_bytes=bucket_bytes)

    # -- GPU memory between phases (nothing to do on CPU)

    def prepare_for_training(self) -> None:
        """Bring gradients and optimizer state back to the GPU."""
        if self._offloaded:
            self.ddp.restore_grad_buffers()
            self.optimizer.restore_from_cpu()
            self._offloaded = False

    def finish_training(self) -> None:
        """Move optimizer state to the CPU and release the gradients, because rollouts need the memory."""
        # In fp32 the optimizer's parameters are views of the model's, which stay.
        if torch.cuda.is_available() and self.optimizer is not None and self.config.precision != "fp32":
            self.ddp.offload_grad_buffers()
            self.optimizer.offload_to_cpu()
            self._offloaded = True

    def prepare_for_inference(self) -> None:
        """Do nothing: the weights are always on the device, and refit and log-prob passes need nothing else."""
        self.gpt.eval()

    def finish_inference(self) -> None:
        """Release the passes' memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # -- inside

    @runs_on_megatron_device
    def _set_up_training(self) -> None:
        config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(self.gpt.config, config, self.gpt)
        self.optimizer = optimizer.build_optimizer(self.ddp, self.optim, DTYPES[self.config.precision])
        self.decay(self.decayed)
        self.gpt.config.no_sync_func = self.ddp.no_sync
        self.gpt.config.grad_scale_func = None
        # Losses are already divided by global counts, so the token count from the schedule is ignored.
        self.gpt.config.finalize_model_grads_func = lambda models, num_tokens, **kw: finalize_model_grads(models, **kw)

    def _infer(self, batch: SequenceBatch, observe: Observe | None = None) -> dict[str, Tensor]:
        """Return the columns [R] of a forward pass. A batch with fewer sequences than replicas, such as a small held-out set,
        is filled up with copies of its own, whose columns are dropped."""
        replicas, sequences = groups.data_parallel()[1], batch.num_sequences
        tokens = int(batch.response_lengths.sum())
        if sequences < replicas:
            batch = batch.select([i % sequences for i in range(replicas)])
        columns = self._run(batch, None, forward_only=True, observe=observe)[1]
        return {name: column[:tokens] for name, column in columns.items()}

    @runs_on_megatron_device
    def _run(self, batch: SequenceBatch, loss: Loss | None, *, forward_only: bool, observe: Observe | None = None):
        """Do one pass over the batch; returns the columns per sequence and per token."""
        microbatches = self._microbatches(batch)
        try:
            outputs = get_forward_backward_func()(
                forward_step_func=self.get_forward_output_and_loss_func(loss, observe, batch.num_sequences),
                data_iterator=iter(microbatches),
                model=self.gpt if forward_only else self.ddp,
                num_microbatches=len(microbatches),
                seq_length=max(m.tokens.shape[1] for m in microbatches),
                micro_batch_size=1,
                forward_only=forward_only,
            )
        finally:
            routing.end_pass(self.gpt)
        return self._gather_columns(batch, microbatches, outputs)

    def _microbatches(self, batch: SequenceBatch) -> list[packing.Microbatch]:
        lengths = batch.lengths.tolist()
        rank, replicas = groups.data_parallel()
        if batch.num_sequences < replicas:
            raise ValueError(f"{batch.num_sequences} sequences cannot be split over {replicas} data-parallel replicas")
        shares = packing.split_over_replicas(lengths, replicas)
        packs = packing.split_into_microbatches([lengths[i] for i in shares[rank]], self.microbatch_tokens)
        packs = [[shares[rank][i] for i in pack] for pack in packs]
        if self.config.expert_model_parallel_size > 1:
            # Ranks that share experts exchange tokens in every layer, so they all run equally many: others are empty.
            packs += [[]] * (packing.most_microbatches(lengths, shares, self.microbatch_tokens) - len(packs))
        te = uses_transformer_engine(self.config.precision)
        multiple = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        rows = BF16_ROWS if self.device.type == "cpu" and self.config.precision == "bf16" and not te else 1
        return [
            packing.build_microbatch(
                batch,
                pack,
                device=self.device,
                # FP8 GEMMs need every rank's token count to be a multiple of 16.
                pad_multiple=multiple
                * rows
                * self.config.context_parallel_size
                * (2 if te else 1)
                * (16 if self.config.fp8 else 1),
                row_multiple=rows,
                cp_rank=parallel_state.get_context_parallel_rank(),
                cp_size=self.config.context_parallel_size,
                thd=te,
            )
            for pack in packs
        ]

    def _loss_of_hidden(self, microbatch: packing.Microbatch, loss, observe, hidden: Tensor):
        """Return the result of megatron-core's loss function: (sum of losses, token count (unused), columns)."""
        with without_device_mapping():
            return self._losses(microbatch, loss, observe, hidden)

    def _losses(self, microbatch: packing.Microbatch, loss: Loss | None, observe: Observe | None, hidden: Tensor):
        if not microbatch.indices:  # a gradient of zero, but one: its backward pass takes part in the exchange of tokens
            return hidden[:0].sum(), torch.ones((), dtype=torch.int, device=hidden.device), None
        hidden = self._response_hidden(microbatch, hidden)
        logprobs, columns = self._token_columns(microbatch, hidden, observe)
        out = (
            loss(logprobs, columns["entropy"], microbatch.sequences)
            if loss
            else Losses(logprobs.new_zeros(len(microbatch.indices)))
        )
        out.per_sequence["loss"] = out.losses.detach()
        out.per_token |= {name: column.detach() for name, column in (columns | {"logprobs": logprobs}).items()}
        return out.losses.sum(), torch.ones((), dtype=torch.int, device=hidden.device), out

    def _response_hidden(self, microbatch: packing.Microbatch, hidden: Tensor) -> Tensor:
        """Return the hidden states that predict the response tokens, equal on all TP ranks: [t, H]."""
        hidden = hidden.squeeze(0)  # [1, T, H] -> [T, H], T divided by TP under sequence parallelism
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        return hidden[microbatch.predictors]

    def _token_columns(self, microbatch: packing.Microbatch, hidden: Tensor, observe: Observe | None):
        """Return log-probs [R], and columns [R], of which entropy has a gradient too."""
        logprobs, entropy, likeliest = token_logprobs(
            hidden, output_weight(self.gpt), microbatch.targets, kept=microbatch.kept, **self._softmax_options()
        )
        columns = {"entropy": entropy, "likeliest": likeliest} | (observe(hidden) if observe else {})
        own = microbatch.slots.numel()  # rows beyond are padding
        logprobs, columns = logprobs[:own], {name: column[:own] for name, column in columns.items()}
        if self.config.context_parallel_size > 1:
            total = int(microbatch.sequences.response_lengths.sum())
            group = parallel_state.get_context_parallel_group()

            def gather(column: Tensor) -> Tensor:
                return groups.SumOverGroup.apply(column.new_zeros(total).index_add(0, microbatch.slots, column), group)

            return gather(logprobs), {name: gather(column) for name, column in columns.items()}
        return logprobs, columns

    def _softmax_options(self) -> dict:
        return dict(
            vocab_size=self.arch.vocab_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_tokens=self.config.logprob_chunk_tokens,
            in_fp32=self.config.fp32_logits,
            temperature=self.temperature,
        )

    def _gather_columns(self, batch, microbatches, outputs: list[Losses]):
        """Gather columns of all microbatches of all replicas, in the order of the global batch, on every rank's CPU."""
        outputs = [output for output in outputs if output is not None]  # of microbatches without sequences
        sequences = torch.tensor([i for m in microbatches for i in m.indices])
        tokens = ragged_positions(batch.response_lengths, sequences)
        per_sequence = self._gather([o.per_sequence for o in outputs], sequences, batch.num_sequences)
        per_token = self._gather([o.per_token for o in outputs], tokens, int(batch.response_lengths.sum()))
        return per_sequence, per_token

    def _gather(self, columns: list[dict[str, Tensor]], places: Tensor, total: int) -> dict[str, Tensor]:
        # Only the last stage has outputs, so it names the columns.
        names = groups.from_last_stage(list(columns[0]) if columns else None)
        full = torch.zeros(len(names), total)
        if columns:
            for row, name in zip(full, names, strict=True):
                row[places] = torch.cat([c[name] for c in columns]).float().cpu()
        return dict(zip(names, groups.sum_over_replicas_and_stages(full.to(self.device)).cpu(), strict=True))

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Turn the model into the reference: switch its adapters off, or exchange the policy's weights for the copied
        ones."""
        with lora.switched_off(self.gpt) if self.config.lora.rank else self.reference.inside(self.gpt):
            yield
