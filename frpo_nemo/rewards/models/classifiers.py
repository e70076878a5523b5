"""Sequence classification models: the built-in `reward_model`, with one label, and guards with a label per category. A
server returns the head's raw outputs (vLLM's /classify, without activation), so local and remote numbers are the same.
"""

from __future__ import annotations

from typing import Any

import torch

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.files import ModelFiles, conversation
from frpo_nemo.rewards.models.local import LocalModel, LocalWeights
from frpo_nemo.rewards.models.remote import UNREADABLE, finite, quote
from frpo_nemo.rewards.registry import Failure


class Classifier:
    """A model whose `logits` are the head's outputs for prompts and responses."""

    def __init__(
        self, model: str, *, revision: str | None, chat: bool, local: dict | None, remote: dict | None
    ) -> None:
        """chat: pass prompt and response through the model's chat template, else the response alone. Raises ConfigError."""
        self.files = ModelFiles(model, revision, "ForSequenceClassification", local=local, remote=remote)
        self._chat = chat
        if chat:
            self.files.require_chat_template()

    def logits(self, prompts: list, completions: list[str]) -> list[list[float] | Failure]:
        """Return one number per label, for each response."""
        sequences = [self._encode(p, c) for p, c in zip(prompts, completions, strict=True)]
        return self.files.score(sequences, self.files.longest, self._evaluate)

    def _encode(self, prompt: Any, response: str) -> list[int] | Failure:
        if self._chat:
            return self.files.chat_ids(conversation(prompt, response), add_generation_prompt=False)
        return self.files.tokenizer(response)["input_ids"]

    def _evaluate(self, sequences: list[list[int]]) -> list[list[float] | Failure]:
        host = self.files.host
        if isinstance(host, LocalModel):
            return [*host.class_logits(sequences)]
        model = host.served_model_name
        bodies = [{"model": model, "input": [ids], "use_activation": False} for ids in sequences]
        return [a if isinstance(a, Failure) else self._read(a) for a in host.post_all("/classify", bodies)]

    def _read(self, answer: Any) -> list[float] | Failure:
        try:
            logits = [finite(value) for value in answer["data"][0]["probs"]]
        except UNREADABLE:
            return Failure("error", f"the server's answer has no classifier outputs: {quote(answer)}")
        if len(logits) != self.files.config.num_labels:
            return Failure("error", f"the server's model has {len(logits)} labels, not {self.files.config.num_labels}")
        return logits


class RewardModel:
    """The built-in `reward_model`: sigmoid of the output for the conversation. All arguments: docs/reward_models.md."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        sigmoid: bool = True,
        local: dict[str, Any] | None = None,
        remote: dict[str, Any] | None = None,
    ) -> None:
        self._classifier = Classifier(model, revision=revision, chat=True, local=local, remote=remote)
        labels = self._classifier.files.config.num_labels
        if labels != 1:
            raise ConfigError(f"model={model} has the wrong head: {labels} labels, where a reward model has one")
        self._sigmoid = sigmoid

    def load(self) -> None:
        """Read the weights of a local model."""
        self._classifier.files.load()

    def local_weights(self) -> list[LocalWeights]:
        """Return the models that `load` will read."""
        return self._classifier.files.local_weights()

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float | Failure]:
        """Return a number per response, in [0, 1] with `sigmoid`."""
        rows = self._classifier.logits(prompts, completions)
        return [row if isinstance(row, Failure) else self._score(row[0]) for row in rows]

    def _score(self, logit: float) -> float:
        return torch.tensor(logit, dtype=torch.float64).sigmoid().item() if self._sigmoid else logit


class GuardClassifier:
    """Scores a response by the largest probability among the categories of harm."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        safe_labels: list[str] | None = None,
        chat: bool = False,
        local: dict[str, Any] | None = None,
        remote: dict[str, Any] | None = None,
    ) -> None:
        """safe_labels: those that mean no harm. Labels exclude each other (softmax) unless the model's problem_type is
        multi_label_classification. Raises ConfigError."""
        self._classifier = Classifier(model, revision=revision, chat=chat, local=local, remote=remote)
        config, safe = self._classifier.files.config, safe_labels or []
        labels = [config.id2label[i] for i in range(config.num_labels)]
        for label in safe:
            if label not in labels:
                raise ConfigError(f"safe_labels: model={model} has no label {label!r}; it has {', '.join(labels)}")
        self._harmful = [i for i, label in enumerate(labels) if label not in safe]
        if not self._harmful:
            raise ConfigError(f"safe_labels names all labels of model={model}: no category of harm is left")
        self._independent = config.problem_type == "multi_label_classification" or len(labels) == 1
        if not self._independent and not safe:
            raise ConfigError(
                f"the labels of model={model} exclude each other ({', '.join(labels)}), so one of them always has a large "
                "probability: name those that mean no harm in safe_labels"
            )

    def load(self) -> None:
        """Read the weights of a local model."""
        self._classifier.files.load()

    def local_weights(self) -> list[LocalWeights]:
        """Return the models that `load` will read."""
        return self._classifier.files.local_weights()

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float | Failure]:
        """Return a number in [0, 1] per response."""
        rows = self._classifier.logits(prompts, completions)
        return [row if isinstance(row, Failure) else self._score(row) for row in rows]

    def _score(self, logits: list[float]) -> float:
        row = torch.tensor(logits, dtype=torch.float64)
        return (row.sigmoid() if self._independent else row.softmax(0))[self._harmful].max().item()
