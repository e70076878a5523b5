"""Every line of the table: its name, what a pass means, which function measures it and what it needs; and which lines
share processes. Imports nothing heavy, because gpu_check.py reads it before any process starts.

A group is started in fresh processes, so that GPU memory and state begin clean and a crash costs one line. The limits
of the groups with one rank add up to at most ONE_GPU_SECONDS; a test holds them to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ONE_GPU_SECONDS = 600


@dataclass(frozen=True)
class Check:
    """One line. passes: what is true when it passes. function: module of checks/ and function in it. needs: of those below."""

    name: str
    passes: str
    function: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Checks that share `ranks` processes, one after the other. seconds: all of them together, start included. world:
    False where the checks start their own processes."""

    name: str
    ranks: int
    seconds: int
    checks: tuple[Check, ...]
    world: bool = True


CUDA, TE, HOPPER, DATA_SHEET = "cuda", "transformer_engine", "hopper", "data_sheet"
RECIPES = ("delayed", "tensorwise", "blockwise")  # of model.fp8_recipe

GROUPS = (
    Group(
        "environment",
        ranks=1,
        seconds=80,  # nearly all for the first import of the packages
        checks=(
            Check("environment", "the packages are those of the lock, and the GPU is idle", "environment:environment"),
        ),
    ),
    Group(
        "numerics",
        ranks=1,
        seconds=80,
        checks=(
            Check("parity_fp32", "fp32 equals transformers", "parity:fp32"),
            Check("parity_local", "local layers in bf16 round like transformers", "parity:local"),
            Check("parity_te", "Transformer Engine in bf16 rounds like transformers", "parity:default", (CUDA, TE)),
            Check("fp32_logits", "model.fp32_logits leaves products as they are", "parity:fp32_logits"),
            Check("packed_local", "sequences of a pack do not see each other, local layers", "attention:local"),
            Check("packed_thd", "the same with Transformer Engine's thd attention", "attention:default", (CUDA, TE)),
            *(
                Check(f"fp8_{recipe}", f"{recipe} FP8 is close to bf16", f"fp8:{recipe}", (CUDA, TE, HOPPER))
                for recipe in RECIPES
            ),
        ),
    ),
    Group(
        "training",
        ranks=1,
        seconds=80,
        checks=(
            Check("offload", "the optimizer leaves the GPU and returns bit for bit", "training:offload"),
            Check("memory_flat", "memory does not grow from step to step", "training:memory_flat"),
            Check("resume", "a resumed run takes the same step again", "training:resume"),
            Check("lora", "adapters alone are trained, and merge into the weights", "training:lora"),
            Check("objectives", "FRPO's step becomes GRPO's as lambda grows, and costs no more", "training:objectives"),
        ),
    ),
    Group(
        "engine",
        ranks=1,
        seconds=140,
        checks=(
            Check("engine_refit", "vLLM computes with the policy's weights", "engine:refit"),
            Check("engine_follows", "and with the new ones after each update", "engine:follows"),
            Check("engine_sleep", "it sleeps, gives memory back, wakes unchanged", "engine:sleep"),
            Check("engine_graphs", "all that ran in CUDA graphs", "engine:graphs", (CUDA,)),
            Check("rollout_speed", "sampling is about as fast as plain vLLM's", "engine:speed"),
        ),
    ),
    Group(
        "engine_eager",
        ranks=1,
        seconds=50,
        checks=(Check("engine_eager", "the same without CUDA graphs", "engine:eager_follows", (CUDA,)),),
    ),
    Group(
        "stack",
        ranks=1,
        seconds=95,
        checks=(
            Check("refit_speed", "seconds of a refit, by tensors of a 7B model's shapes", "speed:refit"),
            Check("mfu", "share of the GPU's peak in a training step of these shapes", "speed:mfu", (DATA_SHEET,)),
            *(
                Check(f"fp8_{recipe}_speed", "FP8 pays for these shapes", f"speed:{recipe}", (CUDA, TE, HOPPER))
                for recipe in RECIPES
            ),
        ),
    ),
    Group(
        "recipe",
        ranks=1,
        seconds=75,
        checks=(Check("recipe", "recipes/frpo.py trains, refits, saves and exports", "recipe:frpo"),),
        world=False,
    ),
    Group(
        "layouts",
        ranks=2,
        seconds=150,
        checks=(
            Check("layout_dp2", "the first step on DP2 is transformers'", "layouts:dp2"),
            Check("layout_tp2", "the same on TP2 with sequence parallelism", "layouts:tp2"),
            Check("layout_pp2", "the same on PP2", "layouts:pp2"),
            Check("layout_cp2", "the same on CP2", "layouts:cp2", (CUDA, TE)),
        ),
    ),
    Group(
        "engine_tp2",
        ranks=2,
        seconds=150,
        checks=(Check("engine_tp2", "an engine on TP2 follows a policy on PP2", "engine:tp2_follows"),),
    ),
    Group(
        "layouts_8",
        ranks=8,
        seconds=200,
        checks=(
            Check("layout_tp2_pp2_dp2", "the first step on TP2 PP2 DP2 is transformers'", "layouts:tp2_pp2_dp2"),
            Check("layout_tp2_cp2_dp2", "the same on TP2 CP2 DP2", "layouts:tp2_cp2_dp2", (CUDA, TE)),
        ),
    ),
)


def not_applicable(group: Group, check: Check, facts: dict[str, Any]) -> str | None:
    """Return why the check does not apply here, or None. facts: those of facts.py, and ranks, how many processes may run at
    once."""
    if not facts["cuda"] and (CUDA in check.needs or group.ranks > facts["ranks"]):
        return "needs CUDA" if group.ranks <= facts["ranks"] else f"needs CUDA and {group.ranks} GPUs"
    if group.ranks > facts["ranks"]:
        return f"needs {group.ranks} GPUs: --gpus {group.ranks}"
    if TE in check.needs and not facts["transformer_engine"]:
        return "needs Transformer Engine, which is not installed"
    if TE in check.needs and not facts["packed_attention"]:
        return "needs a GPU of compute capability 9.0, or flash-attn"
    if HOPPER in check.needs and facts["capability"] < [9, 0]:
        return "needs a GPU of compute capability 9.0; this one has {}.{}".format(*facts["capability"])
    if DATA_SHEET in check.needs and facts["cuda"] and not facts["peak_tflops"]:
        return f"needs the peak of {facts['device']}, which configs/cluster does not have"
    return None


def by_name() -> dict[str, Check]:
    """Return all checks, in the order of the table."""
    return {check.name: check for group in GROUPS for check in group.checks}
