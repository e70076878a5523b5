"""What may be set is documented in YAML with its true default, and every file in configs/ fits the schema."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, GRPO, DrGRPO, build_objective
from frpo_nemo.planning.plan import PlanRun
from frpo_nemo.training.cli import CONFIGS, compose
from frpo_nemo.training.config import FRPORun, SFTRun
from frpo_nemo.training.schema import documented_keys, load

OPTION = re.compile(r"#( +(?:- )?)(\w+):(?: +(?!#)(.*?))?(?: +# (.+))?$")


def documented(file: str) -> dict[str, tuple[str, str]]:
    """key -> (default as text, sentence), from lines `#   key: default   # sentence`; indentation gives the path."""
    out, path = {}, []
    for line in (CONFIGS / file).read_text().split("_self_\n")[-1].splitlines():
        if not (match := OPTION.match(line)):
            continue
        spaces, key, default, sentence = match.groups()
        path = [(indent, name) for indent, name in path if indent < len(spaces)] + [(len(spaces), key)]
        if key != "NAME":
            out[".".join(name for _, name in path if name != "NAME")] = (default, sentence)
    return out


def default_of(option: dataclasses.Field) -> Any:
    return option.default_factory() if option.default_factory is not dataclasses.MISSING else option.default


@pytest.mark.parametrize(
    "schema, pages",
    [(FRPORun, ["frpo.yaml"]), (SFTRun, ["frpo.yaml", "sft.yaml"]), (PlanRun, ["plan.yaml"])],
)
def test_every_option_is_documented_with_its_default(schema, pages):
    options = {k: v for page in pages for k, v in documented(page).items()}
    for key, option in documented_keys(schema):
        if key.startswith(("data.validation.", "probe.prompts.", "probe.reward.")):
            continue  # "like train's", "like reward"
        assert key in options, f"{key} is not in {pages[-1]}"
        default, sentence = options[key]
        if dataclasses.is_dataclass(default_of(option)):
            continue
        shown = OmegaConf.to_container(OmegaConf.create(f"value: {default}"), throw_on_missing=False)["value"]
        assert shown == default_of(option), key
        assert sentence and sentence.endswith("."), f"{key} has no sentence"


def test_documentation_has_no_option_that_does_not_exist():
    assert set(documented("frpo.yaml")) <= {key for key, _ in documented_keys(FRPORun)}
    assert set(documented("plan.yaml")) <= {key for key, _ in documented_keys(PlanRun)}
    assert set(documented("sft.yaml")) <= {key for key, _ in documented_keys(SFTRun)}


@pytest.mark.parametrize("name, cls", [("frpo", FRPO), ("grpo", GRPO), ("dr_grpo", DrGRPO)])
def test_objective_files_document_their_fields(name, cls):
    lines = (CONFIGS / f"objective/{name}.yaml").read_text().splitlines()
    options = OmegaConf.create("\n".join(line.removeprefix("# ") for line in lines[2:]))
    defaults = {f.name: "???" if f.default is dataclasses.MISSING else f.default for f in dataclasses.fields(cls)}
    assert OmegaConf.to_container(options) == defaults


def configurations(*directories: str) -> list[str]:
    return [f"{d}/{file.stem}" for d in directories for file in sorted((CONFIGS / d).glob("*.yaml"))]


@pytest.mark.parametrize("name", configurations("experiment"))
def test_experiments_fit_the_schema(name):
    check_fits(name)


@pytest.mark.parametrize("choice", configurations("parallel", "model", "data", "reward", "objective"))
def test_choices_of_groups_fit_the_schema(choice):
    check_fits("frpo", choice.replace("/", "="))


def check_fits(config: str, *overrides: str) -> None:
    cfg = compose(config, overrides)
    try:
        run = load(FRPORun if "objective" in cfg else SFTRun, cfg)
        if "objective" in cfg:
            build_objective(run.objective)
    except ConfigError as error:
        assert str(error).startswith("No value for"), error  # for others to build on
