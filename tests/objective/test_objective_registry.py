"""Building objectives from configuration: what works, and one clear sentence for what does not."""

from __future__ import annotations

import dataclasses
import re
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective import FRPO, GRPO, DrGRPO, Objective, build_objective, register_objective


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "frpo", "lambda_": 2}, FRPO(lambda_=2)),
        (
            {"name": "frpo", "lambda_": 0.5, "jackknife": False, "baseline": False, "scale": "objective"},
            FRPO(lambda_=0.5, jackknife=False, baseline=False, scale="objective"),
        ),
        (
            {"name": "grpo", "clip_low": 0.1, "clip_high": 0.28, "beta": 0.04},
            GRPO(clip_low=0.1, clip_high=0.28, beta=0.04),
        ),
        ({"name": "dr_grpo"}, DrGRPO()),
        ({"_target_": "frpo_nemo.objective.FRPO", "lambda_": 1.0}, FRPO(lambda_=1.0)),
    ],
)
def test_builds_from_dict_and_omegaconf(wrap, config, expected):
    built = build_objective(wrap(config))
    assert type(built) is type(expected)
    assert built == expected


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"name": "frop", "lambda_": 1}, r"objective.name='frop' .*did you mean frpo\?.*dr_grpo, frpo, grpo"),
        ({"name": 3}, "objective.name=3 is not a registered objective"),
        ({"name": ["frpo"]}, "is not a registered objective"),
        ({}, "needs a name .*exactly one of the two"),
        ({"name": "frpo", "_target_": "frpo_nemo.objective.FRPO"}, "needs a name .*exactly one of the two"),
        (
            {"name": "frpo", "lambda": 1},
            r"objective.lambda is not a field of frpo \(did you mean lambda_\?\)",
        ),
        ({"name": "grpo", "clip": 0.2}, r"objective.clip is not a field of grpo .*clip_high, clip_low"),
        (
            {"name": "grpo", "jackknife": True},
            "objective.jackknife is not a field of grpo; its fields are aggregation, beta",
        ),
        ({"name": "frpo"}, "objective.lambda_ or objective.kl_radius must be set: exactly one of the two"),
        ({"name": "frpo", "lambda_": 0}, "objective.lambda_=0 must be a number above 0"),
        ({"name": "frpo", "lambda_": -1.5}, "objective.lambda_=-1.5 must be a number above 0"),
        ({"name": "frpo", "lambda_": float("nan")}, "objective.lambda_=nan must be a finite number above 0"),
        ({"name": "frpo", "lambda_": float("inf")}, "objective.lambda_=inf must be a finite number above 0"),
        ({"name": "frpo", "lambda_": "0.1"}, "objective.lambda_='0.1' must be a number above 0"),
        ({"name": "frpo", "lambda_": True}, "objective.lambda_=true must be a number above 0"),
        ({"name": "frpo", "lambda_": None}, "objective.lambda_ or objective.kl_radius must be set"),
        ({"name": "frpo", "lambda_": 1, "kl_radius": 0.1}, "objective.lambda_ or objective.kl_radius must be set"),
        ({"name": "frpo", "kl_radius": -0.1}, "objective.kl_radius=-0.1 must be a number at least 0"),
        (
            {"name": "frpo", "kl_radius": 0.1, "f_divergence": "chi_squared"},
            "with f_divergence=chi_squared give lambda_",
        ),
        (
            {"name": "frpo", "lambda_": 1, "f_divergence": "tv"},
            "objective.f_divergence=tv must be one of kl, chi_squared",
        ),
        (
            {"name": "frpo", "lambda_": 1, "radius_smoothing": 0.5},
            "objective.radius_smoothing has an effect with kl_radius",
        ),
        (
            {"name": "frpo", "kl_radius": 0.1, "radius_smoothing": 1},
            "radius_smoothing=1 must be a number at least 0",
        ),
        (
            {"name": "frpo", "lambda_": 1, "refresh_importance": "no"},
            "objective.refresh_importance='no' must be true or false",
        ),
        ({"name": "frpo", "lambda_": 1, "beta": -0.1}, "objective.beta=-0.1 must be a number at least 0"),
        ({"name": "frpo", "lambda_": 1, "clip_high": 0}, "objective.clip_high=0 must be a number above 0"),
        ({"name": "grpo", "clip_low": 0.0}, "objective.clip_low=0.0 must be a number above 0 and below 1"),
        ({"name": "dr_grpo", "clip_low": 1.0}, "objective.clip_low=1.0 must be a number above 0 and below 1"),
        (
            {"name": "frpo", "lambda_": 1, "scale": "papre"},
            "objective.scale=papre must be one of paper, objective",
        ),
        ({"name": "frpo", "lambda_": 1, "jackknife": "no"}, "objective.jackknife='no' must be true or false"),
        ({"_target_": "FRPO", "lambda_": 1}, "must be an import path"),
        ({"_target_": "no_such_package.FRPO"}, "cannot be imported: No module named 'no_such_package'"),
        ({"_target_": "frpo_nemo.objective.FRPPO"}, "the module frpo_nemo.objective has no class FRPPO"),
        ({"_target_": "frpo_nemo.objective.build_objective"}, "has no class build_objective"),
        ({"_target_": "collections.OrderedDict"}, "must be a subclass of frpo_nemo.objective.Objective"),
        (
            {"_target_": "frpo_nemo.objective.FRPO", "lamda_": 1},
            r"objective.lamda_ is not a field of .*did you mean lambda_\?",
        ),
    ],
)
def test_each_bad_config_gives_one_sentence(config, sentence):
    with pytest.raises(ConfigError) as error:
        build_objective(config)
    assert re.search(sentence, str(error.value))
    assert str(error.value).endswith((".", "?"))
    assert "\n" not in str(error.value)


def test_a_value_left_missing_in_omegaconf_is_named():
    with pytest.raises(ConfigError, match=r"objective\.lambda_ or objective\.kl_radius must be set: exactly one"):
        build_objective(OmegaConf.create({"name": "frpo", "lambda_": "???"}))


def test_objectives_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FRPO(lambda_=1.0).lambda_ = 2.0


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'frpo' of Other is taken"):

        @register_objective("frpo")
        class Other(Objective):
            pass


def test_an_objective_of_the_users_own_module(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WorstOnly(DrGRPO):
        """Learns from mistakes only."""

        factor: float = 1.0

        def _normalised(self, groups, centred_M):
            return self.factor * centred_M.clamp(max=0)

    module = types.ModuleType("users_module")
    module.WorstOnly = WorstOnly
    monkeypatch.setitem(sys.modules, "users_module", module)
    objective = build_objective({"_target_": "users_module.WorstOnly", "factor": 2.0, "clip_low": 0.5})
    advantages = objective.effective_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0]))
    assert advantages.tolist() == [-1.0, 0.0]
