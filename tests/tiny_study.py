"""A forgetting study of a few steps, for the tests of what runs and reads studies."""

from __future__ import annotations

from frpo_nemo.study.parts import PartConfig, StudyConfig


def tiny_study(out, **changes) -> StudyConfig:
    """Return a random model, two arms of which one cannot start, one later task: a few steps each."""
    few = ["trainer.max_steps=2", "trainer.val_interval=2"]
    shape = ["hidden_size=64", "num_layers=2", "num_heads=2", "ffn_hidden_size=64", "max_position_embeddings=64"]
    validation = ["data.validation.0.limit=8"]
    config = StudyConfig(
        out=str(out),
        seeds=[5],
        prepare=[PartConfig("new_model", None, ["out={dir}/base", "source=toy", "seed={seed}", *shape])],
        model="{dir}/base",
        train=PartConfig("frpo", "experiment/forgetting_train", [*few, *validation]),
        arms={
            "frpo": ["objective=frpo", "objective.lambda_=0.5"],
            "impossible": ["objective=dr_grpo", "model.sequence_parallel=true"],
        },
        tasks={
            "alpaca": PartConfig(
                "sft",
                "experiment/forgetting_alpaca",
                [*few, *validation, "probe.interval=1", "probe.prompts.0.limit=8"],
            )
        },
        jobs=2,
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config
