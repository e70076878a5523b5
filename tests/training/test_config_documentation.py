"""Every option is described once, from which its page and --help are made, and every file in configs/ fits the options."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from docs.make_options import page
from frpo_nemo.config.cli import compose, from_command_line
from frpo_nemo.config.load import load
from frpo_nemo.config.option import MISSING, check_values, option, options_of, own_options
from frpo_nemo.config.options import FRPORun, SFTRun
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.conversion.inputs import ConvertRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.objective import FRPO, GRPO, DrGRPO, build_objective
from frpo_nemo.planning.plan import PlanRun
from frpo_nemo.study.parts import StudyConfig

SCHEMAS = [FRPORun, SFTRun, PlanRun, EvaluateRun, ConvertRun, StudyConfig, FRPO, GRPO, DrGRPO]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_has_a_sentence_and_allows_its_default_and_example(schema):
    for each in options_of(schema):
        assert each.rule.sentence[:1].isupper() and each.rule.sentence.endswith("."), each.key
        if each.default == MISSING:
            assert each.rule.example, each.key
        else:
            assert each.allows(each.default), each.key


def test_the_page_of_options_is_up_to_date():
    """`make options` writes it."""
    assert (CONFIGS.parent / "docs/options.md").read_text() == page()


@pytest.mark.parametrize("schema, name", [(FRPORun, "frpo"), (EvaluateRun, "evaluate"), (StudyConfig, "forgetting")])
def test_help_prints_every_option(schema, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        from_command_line(schema, name)
    words = capsys.readouterr().out.split()
    assert end.value.code == 0
    for each in options_of(schema, described=set()):
        assert any(word == each.key or word.startswith(f"{each.key}=") for word in words), each.key
        assert " ".join(each.rule.sentence.split()) in " ".join(words), each.key


@dataclass
class Example:
    share: float | None = option("Share of something.", 0.5, above=0, at_most=1)
    count: int = option("Number of things; -1: all.", -1, at_least=2, also=-1)
    kind: str = option("Kind.", "plain", choices=("plain", "fancy"))
    names: dict[str, int] = option("Mapping.", dict)
    on: bool = option("Switch.", True)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"share": 0}, "x.share=0 must be a number above 0 and at most 1, or null (Share of something)."),
        (
            {"share": float("nan")},
            "x.share=nan must be a finite number above 0 and at most 1, or null (Share of something).",
        ),
        ({"share": "0.1"}, "x.share='0.1' must be a number above 0 and at most 1, or null (Share of something)."),
        ({"count": 1}, "x.count=1 must be a whole number at least 2, or -1 (Number of things; -1: all)."),
        ({"count": None}, "x.count=null must be a whole number at least 2, or -1 (Number of things; -1: all)."),
        ({"kind": "fency"}, "x.kind=fency must be one of plain, fancy (Kind); did you mean fancy?"),
        ({"on": "yes"}, "x.on='yes' must be true or false (Switch)."),
    ],
)
def test_a_bad_value_is_named_with_what_it_may_be(value, message):
    with pytest.raises(ConfigError) as error:
        check_values(Example(**value), "x.")
    assert str(error.value) == message


def test_good_values_pass():
    check_values(Example())
    check_values(Example(share=None, count=-1, kind="fancy", names={"a": 1}, on=False))
    assert [each.key for each in own_options(Example)] == ["share", "count", "kind", "names", "on"]


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
