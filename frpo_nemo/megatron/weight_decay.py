"""Choose which parameters decay towards zero, by a rule that a run keeps, so its checkpoints name it.

No torch here: `--check` prints the rule.
"""

from __future__ import annotations

from typing import Any

MATRICES = "matrices"  # embeddings, linear layers and adapters, not norms and biases
EVERYTHING = "everything"  # the rule of runs whose checkpoints name none


def apply(optimizer, weight_decay: float, rule: str) -> None:
    """Apply `weight_decay` to the parameters that `rule` names, in megatron-core's `optimizer`.

    megatron-core puts vectors into groups with wd_mult=0, but only its own scheduler, which is not used here, applies
    that number: without it every group has the whole decay.
    """
    for group in optimizer.param_groups:
        group["weight_decay"] = weight_decay * (1.0 if rule == EVERYTHING else group["wd_mult"])


def rule_of(record: dict[str, Any]) -> str:
    """Return the rule by which the run of a checkpoint's `record` trains."""
    return record.get("decayed", EVERYTHING)


def describe(weight_decay: float, rule: str, *, adapters: bool) -> str:
    """Return a sentence for the user on what is decayed."""
    if not weight_decay:
        return "optim.weight_decay=0: no weights are decayed"
    if adapters:
        return f"optim.weight_decay={weight_decay:g} applies to the adapters; nothing else is trained"
    if rule == EVERYTHING:
        return (
            f"optim.weight_decay={weight_decay:g} applies to all weights, norms and biases included, as when this run "
            "began; new runs decay matrices only"
        )
    return f"optim.weight_decay={weight_decay:g} applies to embeddings and linear layers, not to norms and biases"
