"""Every way in which a user of Hydra writes a group, a list or a text works, or ends in a sentence that says what to write."""

import pytest
from omegaconf import OmegaConf

from frpo_nemo.config.cli import compose
from frpo_nemo.config.load import load
from frpo_nemo.config.options import FRPORun
from frpo_nemo.errors import ConfigError

TOY = {"target": "frpo_nemo.examples.toy.toy_reward"}
LENGTH = {"target": "length"}
ROW = {"path": "x"}

WORKS = [
    # groups
    (["probe=[]"], "probe", None),
    (["~probe"], "probe", None),
    (["parallel=tp2"], "model.tensor_model_parallel_size", 2),
    (["~parallel"], "model.tensor_model_parallel_size", None),
    (["objective=grpo"], "objective.name", "grpo"),
    (["objective.name=grpo"], "objective.name", "grpo"),
    (["objective={beta: 0.5}"], "objective.beta", 0.5),
    (["+reward={r: {target: length}}"], "reward", {"toy": TOY, "r": LENGTH}),
    (["reward.r={target: length}"], "reward", {"toy": TOY, "r": LENGTH}),
    (["reward.r.target=length"], "reward", {"toy": TOY, "r": LENGTH}),
    (["~reward", "reward.r.target=length"], "reward", {"r": LENGTH}),
    (["~reward", "+reward={r: {target: length}}"], "reward", {"r": LENGTH}),
    (["data={train: [{path: x}]}"], "data.train", [ROW]),
    # lists
    (["data.train=[{path: x}]"], "data.train", [ROW]),
    (["data.train.0={path: x}"], "data.train.0.path", "x"),
    (["data.train.0.path=x"], "data.train.0.path", "x"),
    (["rollout.stop_tokens=['<|eot_id|>','</s>']"], "rollout.stop_tokens", ["<|eot_id|>", "</s>"]),
    (["reward.toy.tasks=[a,b]"], "reward.toy.tasks", ["a", "b"]),
    # texts
    (["data.train.0.prompt={question}"], "data.train.0.prompt", "{question}"),
    (["data.train.0.prompt=Q: {question}, A ="], "data.train.0.prompt", "Q: {question}, A ="),
    (["data.train.0.prompt='{a}, {b} = $x'"], "data.train.0.prompt", "{a}, {b} = $x"),
    (["data.train.0.prompt={a}\n\n{b}"], "data.train.0.prompt", "{a}\n\n{b}"),
    ([r"data.train.0.prompt={a}\n\n{b}"], "data.train.0.prompt", r"{a}\n\n{b}"),  # line ends: data/templates.py
    ([r"data.train.0.prompt=\boxed{{x}}"], "data.train.0.prompt", r"\boxed{{x}}"),
    (["data.train.0.prompt=[1]"], "data.train.0.prompt", "[1]"),
    (["data.train.0.prompt=12"], "data.train.0.prompt", "12"),
    (["data.train.0.completion=null"], "data.train.0.completion", None),
    (['data.train.0.system_prompt="Be brief, please."'], "data.train.0.system_prompt", "Be brief, please."),
    (["run_dir=runs/${trainer.max_steps}"], "run_dir", "runs/100"),
    (["++optim.lr=1e-5"], "optim.lr", 1e-5),
]

REFUSED = [
    # groups
    ("probe=null", "to do without one, write '~probe'"),
    ("probe={}", "to do without one, write '~probe'"),
    ("reward={}", "to do without one, write '~reward'"),
    ("reward=null", "to do without one, write '~reward'"),
    ("probe=3", "probe takes the name of a file in configs/probe (math, "),
    ("probe=toyx", "the choices of probe are math, "),
    ("objective=GRPO", "the choices of objective are dr_grpo, frpo, grpo"),
    ("+probe=toy", "write probe=toy"),
    ("probe=toy,math", "write a list as key=[a,b]"),
    ("reward={r: {target: length}}", "write '~reward' '+reward={r: {target: length}}'"),
    ("objective/grpo", "write objective=grpo"),
    ("experiment=demo", "write --config-name experiment/demo"),
    ("+experiment=demo", "write --config-name experiment/demo"),
    # lists
    ("data.train.5.path=x", "data.train has no entry 5 (the first is 0); to have more entries write the whole list"),
    ("+data.train.1={path: x}", "data.train has no entry 1"),
    ("rollout.stop_tokens=[<|eot_id|>,</s>]", "in the list: \"rollout.stop_tokens=['<|eot_id|>','</s>']\"."),
    ("data.train=[{path: x, 'prompt': y}]", "quote values with special characters and no keys"),
    ("reward.r={target: x, args: {choices: {'yes': 1}}}", "quote values with special characters and no keys"),
    ("data.train[0].path=x", "is written data.train.0.path=x"),
    ("data.train.-1.path=x", "numbered from 0"),
    ("data.train.last.path=x", "numbered from 0"),
    ("data.train={path: x}", "write data.train=[{path: x}]"),
    ("data.train=x", "must be a list, such as [{path: prompts.jsonl}]"),
    ("data.train=null", "must be a list, such as [{path: prompts.jsonl}]"),
    ("data.train=[x]", "must be a mapping with keys among path, "),
    ("reward.toy.tasks=a", "must be a list or null"),
    ("reward.toy.tasks=a,b", "write a list as key=[a,b]"),
    # values
    ("optim.lr", "write optim.lr=VALUE"),
    ("optim.lr: 1", "write optim.lr=1"),
    ("optim.lr 1", "write optim.lr=1"),
    ("optim.lr=1 trainer.seed=2", "must be a number"),
    ("lr=1", "the nearest valid key is optim.lr"),
    ("optim=null", "must be a mapping with keys among lr, "),
    ("rollout.temperature=range(1,3)", "one run takes one value; start one command per value"),
    ("trainer.seed=choice(1,2)", "one run takes one value; start one command per value"),
    ("run_dir=${trainer.nothing}", "the option trainer.nothing, which does not exist."),
]


@pytest.mark.parametrize(("overrides", "key", "value"), WORKS, ids=[" ".join(overrides) for overrides, _, _ in WORKS])
def test_it_works(overrides, key, value):
    composed = compose("experiment/demo", overrides)
    load(FRPORun, composed)
    found = OmegaConf.select(composed, key)
    assert (OmegaConf.to_container(found) if OmegaConf.is_config(found) else found) == value


@pytest.mark.parametrize(("override", "expected"), REFUSED, ids=[override for override, _ in REFUSED])
def test_it_ends_in_one_sentence(override, expected):
    with pytest.raises(ConfigError) as error:
        load(FRPORun, compose("experiment/demo", [override]))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["experiment/sft_7b", "sft"])
def test_a_group_that_a_recipe_lacks_is_not_asked_for_again(name):
    with pytest.raises(ConfigError, match="reward=toy: this configuration has no group reward"):
        compose(name, ["reward=toy"])
