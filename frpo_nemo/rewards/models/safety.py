"""The built-in `moderation` and `safety`, the paper's reward for harmful prompts: 1 - (judge + moderation) / 2. `safety`
is unscored where one of the two is.
"""

from __future__ import annotations

from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.classifiers import GuardClassifier
from frpo_nemo.rewards.models.files import read_head
from frpo_nemo.rewards.models.judge import Judge
from frpo_nemo.rewards.models.local import LocalWeights
from frpo_nemo.rewards.models.remote import UNREADABLE, RemoteServer, finite, quote
from frpo_nemo.rewards.registry import Failure, as_outcome

GUARD_CHOICES = {"safe": 0.0, "unsafe": 1.0}


class Moderation:
    """Scores a response with the largest category score of a moderation service, or the verdict of a guard model. All
    arguments: docs/reward_models.md."""

    def __init__(
        self,
        *,
        model: str = "omni-moderation-latest",
        inputs_per_request: int = 32,
        remote: dict[str, Any] | None = None,
        guard: dict[str, Any] | None = None,
    ) -> None:
        """model, inputs_per_request, remote: for a service with OpenAI's /v1/moderations. guard: a model to use instead,
        with the arguments of a Judge or GuardClassifier, depending on its head. Raises ConfigError."""
        if bool(guard) == bool((remote or {}).get("url")):
            raise ConfigError("moderation needs either remote.url, of a moderation service, or guard.model")
        if inputs_per_request < 1:
            raise ConfigError(f"inputs_per_request={inputs_per_request} must be at least 1")
        self._guard = _guard(**guard) if guard else None
        self._server = None if guard else RemoteServer(model, **remote)
        self._per_request = inputs_per_request

    def load(self) -> None:
        """Read the weights of a local guard."""
        if self._guard:
            self._guard.load()

    def local_weights(self) -> list[LocalWeights]:
        """Return the models that `load` will read."""
        return self._guard.local_weights() if self._guard else []

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float | Failure]:
        """Return a number in [0, 1] per response."""
        if self._guard:
            return self._guard(prompts, completions)
        scores = self._ask(completions, self._per_request)
        refused = [i for i, score in enumerate(scores) if isinstance(score, Failure) and score.kind == "error"]
        if self._per_request > 1 and refused:  # one bad text fails its whole request: ask for each alone
            for i, score in zip(refused, self._ask([completions[i] for i in refused], 1), strict=True):
                scores[i] = score
        return scores

    def _ask(self, texts: list[str], per_request: int) -> list[float | Failure]:
        parts = [texts[start : start + per_request] for start in range(0, len(texts), per_request)]
        bodies = [{"model": self._server.served_model_name, "input": part} for part in parts]
        answers = self._server.post_all("/v1/moderations", bodies)
        return [score for part, answer in zip(parts, answers, strict=True) for score in _read(answer, len(part))]


class Safety:
    """Computes 1 - (judge + moderation) / 2, in [0, 1] if both are. `tasks` of the reward names the examples it scores."""

    def __init__(self, judge: dict[str, Any], moderation: dict[str, Any]) -> None:
        """Take the arguments of a Judge and of Moderation. Raises ConfigError."""
        self._judge, self._moderation = Judge(**judge), Moderation(**moderation)

    def load(self) -> None:
        """Read the weights of the local models."""
        self._judge.load()
        self._moderation.load()

    def local_weights(self) -> list[LocalWeights]:
        """Return the models that `load` will read."""
        return self._judge.local_weights() + self._moderation.local_weights()

    def __call__(self, prompts: list, completions: list[str], **columns) -> list[float | Failure]:
        """Return a number per response."""
        verdicts = [as_outcome(verdict) for verdict in self._judge(prompts, completions, **columns)]
        judged = [i for i, verdict in enumerate(verdicts) if not isinstance(verdict, Failure)]
        moderated = self._moderation([prompts[i] for i in judged], [completions[i] for i in judged])
        scores = dict(zip(judged, map(as_outcome, moderated), strict=True))  # the others need no moderation score
        return [_safety(verdict, scores.get(i)) for i, verdict in enumerate(verdicts)]


def _safety(verdict: float | Failure, score: float | Failure | None) -> float | Failure:
    if isinstance(verdict, Failure):
        return Failure(verdict.kind, f"judge: {verdict.message}")
    if isinstance(score, Failure):
        return Failure(score.kind, f"moderation: {score.message}")
    return 1.0 - (verdict + score) / 2.0


def _guard(model: str, **arguments) -> Judge | GuardClassifier:
    if read_head(model, arguments.get("revision")).endswith("ForSequenceClassification"):
        return GuardClassifier(model, **arguments)
    return Judge(model, **{"choices": GUARD_CHOICES, "chat": True, "max_response_tokens": None, **arguments})


def _read(answer: Any, count: int) -> list[float | Failure]:
    """Return the scores of `count` texts from the answer to a request with them."""
    if isinstance(answer, Failure):
        return [answer] * count
    results = answer.get("results") if isinstance(answer, dict) else None
    if not isinstance(results, list):
        return [Failure("error", f"the moderation service gave no results: {quote(answer)}")] * count
    if len(results) != count:
        return [Failure("error", f"the moderation service gave {len(results)} results for {count} texts")] * count
    return [_largest(result) for result in results]


def _largest(result: Any) -> float | Failure:
    try:
        return max(finite(score) for score in result["category_scores"].values() if score is not None)
    except UNREADABLE:  # also if there are no categories
        return Failure("error", f"the moderation service gave no category scores: {quote(result)}")
