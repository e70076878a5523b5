"""Reward models inside the training process. Weights stay in host memory and are on the policy's GPU only during a call,
while vLLM sleeps; without a GPU, or with device=cpu, the CPU computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from frpo_nemo.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class LocalWeights:
    """Bytes that a local model keeps in host memory, and also has on the GPU while it evaluates (`on_gpu`)."""

    bytes: int
    on_gpu: bool


class LocalModel:
    """A transformers model, `auto_class` (AutoModelForCausalLM ...), that evaluates ragged token ids in batches of
    similar length."""

    def __init__(
        self,
        auto_class: str,
        model: str,
        revision: str | None,
        *,
        device: str = "auto",
        dtype: str = "bfloat16",
        batch_size: int = 16,
    ) -> None:
        """device: auto (a GPU if there is one) or cpu. Reads no weights. Raises ConfigError."""
        if device not in ("auto", "cpu"):
            raise ConfigError(f"local.device={device} must be auto or cpu")
        if dtype not in DTYPES:
            raise ConfigError(f"local.dtype={dtype} must be one of {', '.join(DTYPES)}")
        if batch_size < 1:
            raise ConfigError(f"local.batch_size={batch_size} must be at least 1")
        self._auto_class, self._name, self._revision = auto_class, model, revision
        self._on_gpu, self._dtype, self._batch_size = device == "auto" and torch.cuda.is_available(), dtype, batch_size
        self._model: Any = None

    def weights(self, config: Any) -> LocalWeights:
        """Return the size of what `load` will read, from the model's `config`; reads nothing."""
        import transformers

        with torch.device("meta"):
            model = getattr(transformers, self._auto_class).from_config(config, trust_remote_code=False)
        numbers = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        return LocalWeights(numbers * DTYPES[self._dtype].itemsize, self._on_gpu)

    def load(self) -> None:
        """Read the weights into host memory. Raises ConfigError when weights are missing, because transformers would
        initialise them at random."""
        import transformers

        transformers.utils.logging.disable_progress_bar()  # every rank would show one
        auto_class = getattr(transformers, self._auto_class)
        options = dict(dtype=DTYPES[self._dtype], use_safetensors=True, trust_remote_code=False)
        try:
            model, report = auto_class.from_pretrained(
                self._name, revision=self._revision, output_loading_info=True, **options
            )
        except (OSError, ValueError) as problem:
            raise ConfigError(f"model={self._name} cannot be read: {problem}") from problem
        if report["missing_keys"]:
            lacking = f"model={self._name} lacks weights: {', '.join(sorted(report['missing_keys'])[:3])}"
            for adapter in getattr(model, "peft_config", {}).values():  # such as AdaLoRA's, which only peft fills in
                kind = adapter.peft_type.value
                lacking += f"; transformers does not read all of its adapter ({kind}): merge it into its base model"
            raise ConfigError(lacking)
        self._model = model.eval().requires_grad_(False)

    def next_token_logprobs(self, sequences: list[list[int]], token_ids: list[int]) -> list[list[float]]:
        """Return, for each sequence, the log-probs of `token_ids` as its next token."""

        def evaluate(padded: Tensor, mask: Tensor) -> Tensor:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = self._model(input_ids=padded, attention_mask=mask, position_ids=positions, logits_to_keep=1)
            return out.logits[:, -1].float().log_softmax(-1)[:, token_ids]

        return self._evaluate(sequences, evaluate, side="left")  # the model returns logits of the last position only

    def class_logits(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the classification head's outputs for each sequence."""

        def evaluate(padded: Tensor, mask: Tensor) -> Tensor:
            return self._model(input_ids=padded, attention_mask=mask).logits.float()

        return self._evaluate(sequences, evaluate, side="right")

    def _evaluate(self, sequences: list[list[int]], evaluate, side: str) -> list[list[float]]:
        results: list[list[float]] = [[]] * len(sequences)
        by_length = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        with self._weights_in_place() as device, torch.inference_mode():
            for start in range(0, len(by_length), self._batch_size):
                rows = by_length[start : start + self._batch_size]
                padded, mask = self._pad([sequences[i] for i in rows], side)
                for i, values in zip(rows, evaluate(padded.to(device), mask.to(device)).tolist(), strict=True):
                    results[i] = values
        return results

    def _pad(self, sequences: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """Return token ids and mask, int64 [sequences, longest]. Classification heads of causal models take as a sequence's
        last token the last one that isn't config.pad_token_id, which may be the token that a text ends with, or unset. So
        this batch is padded with a token that does not occur in it, and the config names that token."""
        used = set().union(*sequences)
        filler = next(token for token in range(len(used) + 1) if token not in used)
        self._model.config.get_text_config().pad_token_id = filler
        longest = max(map(len, sequences))
        padded = torch.full((len(sequences), longest), filler)
        mask = torch.zeros_like(padded)
        for row, ids in enumerate(sequences):
            place = slice(longest - len(ids), longest) if side == "left" else slice(len(ids))
            padded[row, place], mask[row, place] = torch.tensor(ids), 1
        return padded, mask

    @contextlib.contextmanager
    def _weights_in_place(self) -> Iterator[torch.device]:
        """Place the weights for the duration of a call: on the GPU, as copies of those in host memory."""
        if not self._on_gpu:
            yield torch.device("cpu")
            return
        device = torch.device("cuda", torch.cuda.current_device())
        tensors = [*self._model.parameters(), *self._model.buffers()]
        hosted = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(device)
            yield device
        finally:
            for tensor, host in zip(tensors, hosted, strict=True):
                tensor.data = host
            torch.cuda.empty_cache()  # vLLM and the policy allocate on the same GPU
