"""Print docs/options.md. Run by `make options`; a test compares the page with what this prints."""

from __future__ import annotations

from frpo_nemo.config.option import options_of
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.config.reference import grouped, table
from frpo_nemo.conversion.inputs import ConvertRun
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.objective import FRPO, GRPO, DrGRPO
from frpo_nemo.planning.plan import PlanRun
from frpo_nemo.study.parts import StudyConfig

HEAD = """\
# Options

Written by `make options` from the code, which also checks values by it. Give options on the command line
(`optim.lr=1e-6`), or in a YAML file of your own:

    defaults: [frpo, override parallel: tp2, _self_]
    optim: {lr: 1.0e-6}

started with `--config-dir DIR --config-name FILE`. `python recipes/frpo.py --help` prints the same as this page.

In a key, `*` is the number of a list's entry, from 0 (`data.train.0.path`), or a name in a mapping (`reward.mine.target`).
An option without a default has to be given, in a list or a mapping only for the entries that there are. `null` is nothing.
A run that is resumed may change the options of which the last column says so; another change is refused.
"""
RECIPES = [
    ("evaluate", EvaluateRun, "[evaluation.md](evaluation.md) explains the benchmarks."),
    ("convert", ConvertRun, "[conversion.md](conversion.md) explains the ways, of which the input decides."),
    ("plan", PlanRun, "[planning.md](planning.md) explains the plan."),
    (
        "forgetting",
        StudyConfig,
        "[forgetting.md](forgetting.md) explains a study, [slurm.md](slurm.md) one on a cluster. In texts, {seed}, {out} (of "
        "the study) and {dir} ({out}/seed_{seed}) are filled in. The study sets run_dir, model.path and trainer.seed of "
        "trainings, and model.path and out of evaluations.",
    ),
]


def page() -> str:
    described: set[type] = set()  # what lists and mappings hold, once on the page
    parts = [HEAD, "## recipes/frpo.py\n"]
    for group in grouped(options_of(FRPORun, described=described)):
        parts.append(f"### {group[0].key}\n\n{table(group)}\n")
        if group[0].key == "objective":
            parts += [with_objective(*each) for each in (("frpo", FRPO), ("grpo", GRPO), ("dr_grpo", DrGRPO))]
    parts.append(f"## recipes/sft.py\n\n{sft()}\n")
    for name, schema, explained in RECIPES:
        parts.append(f"## recipes/{name}.py\n\n{explained}\n\n{table(list(options_of(schema, described=described)))}\n")
    return "\n".join(parts)


def with_objective(name: str, objective: type) -> str:
    return f"With `objective.name={name}`:\n\n{table(list(options_of(objective, 'objective.')))}\n"


def sft() -> str:
    """How the options of recipes/sft.py differ from those of recipes/frpo.py."""
    frpo, own = {each.key for each in options_of(FRPORun)}, {each.key: each for each in options_of(SFTRun)}
    without = [f"`{key}`" for key in sorted(frpo - own.keys()) if key.split(".")[0] in own or "." not in key]
    more = table([each for key, each in own.items() if key not in frpo])
    return f"The options of recipes/frpo.py, except {', '.join(without)}. Of its own it has:\n\n{more}"


if __name__ == "__main__":
    print(page(), end="")
