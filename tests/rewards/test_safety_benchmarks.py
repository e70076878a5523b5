"""probe=safety_benchmarks in whole runs: recipes/evaluate.py, and a fine-tuning of recipes/sft.py. Tiny models as policy,
StrongREJECT's judge and reward model; a recorded chat model as HarmBench's judge, which may be away. Reads HarmBench,
StrongREJECT and the paper's prompts in ../shared/data, which the product does not need."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from recorded_judge import RecordedJudge
from reward_models import LOCAL, TEMPLATE, make_classifier, make_judge
from runs import Job, probes, steps
from tiny_models import make_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from frpo_nemo.config.options import RewardConfig, SourceConfig
from frpo_nemo.config.overrides import CONFIGS
from frpo_nemo.data.batch import SequenceBatch
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.options import RewardProbeConfig
from frpo_nemo.evaluation.reward_probe import check_reward_probe
from frpo_nemo.rewards.models.classifiers import RewardModel
from frpo_nemo.rewards.models.judge import Judge
from frpo_nemo.rollout.worker import Rollouts

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = {
    "harmbench": DATA / "harmbench" / "behaviors_text_test.csv",
    "strongreject": DATA / "strongreject" / "strongreject_dataset.csv",
    "normal": DATA / "frpo_paper" / "kl_normal_prompts.jsonl",
}
PROMPTS = {"harmbench": 9, "strongreject": 4, "normal": 3}
SAID = ("Yes, it does.", "no", "As an AI model, I had rather not say.")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return name -> directory of a random model; template: of the judge."""
    absent = [file for file in FILES.values() if not file.exists()]
    if absent:
        pytest.skip(f"{absent[0]} is not there")
    at = tmp_path_factory.mktemp("tiny")
    longest = {"max_position_embeddings": 2048}
    (at / "template.txt").write_text(TEMPLATE)
    return {
        "policy": make_tiny(at / "policy", "llama", layers=2, vocab=103, **longest),
        "judge": make_judge(at / "judge", **longest),
        "reward": make_classifier(at / "reward", ["reward"], **longest),
        "template": str(at / "template.txt"),
    }


def overrides(tiny: dict, url: str) -> list[str]:
    """probe=safety_benchmarks on a few prompts, with these judges."""
    remote = {"url": url, "api_key_env": None, "patience": 0.5, "retries": 1}
    judge = {"model": tiny["judge"], "template_file": tiny["template"], "min_mass": 1e-6}
    rewards = {
        "harmbench_refusal.args.remote": remote,
        "strongreject_score.args": judge,
        "strongreject_score.args.local": LOCAL,
        "helpfulness.args": {"model": tiny["reward"], "revision": None},
        "helpfulness.args.local": LOCAL,
    }
    sources = {
        f"probe.prompts.{i}": {"path": str(FILES[name]), "sample": n} for i, (name, n) in enumerate(PROMPTS.items())
    }
    options = sources | {f"probe.reward.{name}": values for name, values in rewards.items()}
    flat = [f"{at}.{key}={json.dumps(value)}" for at, values in options.items() for key, value in values.items()]
    choice = ["probe=safety_benchmarks", "reward@probe.reward=[harmbench_chat,strongreject,helpfulness]"]
    return [*choice, *flat, "probe.max_response_tokens=12", f"model.path={tiny['policy']}"]


def evaluate(tiny: dict, url: str, out: Path) -> subprocess.CompletedProcess:
    options = [f"out={out}", "dtype=float32", "probe.temperature=0", "probe.max_prompt_tokens=1024"]
    command = [sys.executable, str(CONFIGS.parent / "recipes/evaluate.py"), *overrides(tiny, url), *options]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


def fine_tune(tiny: dict, url: str, directory: Path) -> Job:
    rows = [{"prompt": f"Say {word}.", "completion": word} for word in ("this", "that")]
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["model=tiny_fp32", "optim.lr=1e-3", "trainer.max_steps=2", "trainer.microbatch_tokens=2048"]
    data = f"data.train=[{{path: {directory / 'train.jsonl'}, completion: completion}}]"
    sizes = ["data.sequences_per_step=2", "data.max_prompt_tokens=1024", "logging.tensorboard=false"]
    return Job("sft.py", [*overrides(tiny, url), *options, data, *sizes, "probe.interval=1"], directory / "run")


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A fine-tuning whose judge goes away in its second probe, and meanwhile an evaluation without a judge: (run directory,
    the judge, the evaluation's process, its directory)."""
    at = tmp_path_factory.mktemp("runs")
    judge = RecordedJudge(lambda body, n: SAID[n % 3], lives=PROMPTS["harmbench"] + 3)
    job = fine_tune(tiny, judge.url, at)
    process = evaluate(tiny, "http://127.0.0.1:9", at / "out")
    yield job.succeed().run_dir, judge, process, at / "out"
    judge.close()


def samples(file: Path) -> dict[str, list[dict]]:
    """Return responses by task."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {task: [row for row in rows if row["task"] == task] for task in PROMPTS}


def texts(rows: list[dict]) -> tuple[list[str], list[str]]:
    """Return prompts and responses as rewards see them."""
    prompts = [row["prompt"].removeprefix("u:").removesuffix("\na:") for row in rows]
    return prompts, [row["response"].removesuffix("<eos>") for row in rows]


def test_the_names_of_a_probes_numbers_say_what_was_measured(runs, tiny):
    """Compare the first probe's numbers with the judge's own record, and with the judge and reward model asked again."""
    run_dir, judge, _, _ = runs
    probe, kept = probes(run_dir)[0], samples(run_dir / "probe" / "step_00000000.jsonl")
    said = [answer for *_, answer in judge.seen[:9]]
    assert sorted(said) == sorted(SAID * 3)
    assert probe["probe/reward/harmbench_refusal/mean"] == 0.5, "of six, three did not do it"
    assert probe["probe/scored/harmbench_refusal"] == 6 and probe["probe/reward_failures/harmbench_refusal/error"] == 3
    assert probe["probe/share/unscored"] == 3 / 16
    shown = [body["messages"][1]["content"] for _, body, _ in judge.seen[:9]]
    for response in texts(kept["harmbench"])[1]:
        assert any(f"Answer of the model:\n{response}\n" in text for text in shown)

    strongreject = Judge(tiny["judge"], template=TEMPLATE, min_mass=1e-6, local=LOCAL)
    strongreject.load()
    expected = fmean(strongreject(*texts(kept["strongreject"])))
    assert probe["probe/reward/strongreject_score/mean"] == pytest.approx(expected, abs=1e-6)
    assert probe["probe/reward/task/strongreject/mean"] == pytest.approx(-expected, abs=1e-6)
    helpfulness = RewardModel(tiny["reward"], local=LOCAL)
    helpfulness.load()
    expected = fmean(helpfulness(*texts(kept["normal"])))
    assert probe["probe/reward/helpfulness/mean"] == pytest.approx(expected, abs=1e-6)


def test_a_fine_tuning_goes_on_when_a_judge_goes_away(runs):
    run_dir, judge, _, _ = runs
    first, second, third = probes(run_dir)
    assert [row["step"] for row in steps(run_dir)] == [1, 2] and (run_dir / "hf" / "model.safetensors").exists()
    assert second["probe/scored/harmbench_refusal"] == 2, "three were answered, one of them with nonsense"
    assert second["probe/reward_failures/harmbench_refusal/died"] == 6
    assert third["probe/scored/harmbench_refusal"] == 0 and "probe/reward/harmbench_refusal/mean" not in third
    assert third["probe/reward_failures/harmbench_refusal/died"] == 9
    for row in (first, second, third):
        assert row["probe/scored/strongreject_score"] == 4 and row["probe/scored/helpfulness"] == 3
        assert row["probe/kl/exact"] is not None


def test_a_step_of_which_nothing_was_scored_cannot_be_learned_from():
    def rollouts(*rewards: float) -> Rollouts:
        batch = SequenceBatch.from_lists([[1]] * 2, [[2]] * 2, compared=torch.tensor(rewards))
        return Rollouts(batch, [None])

    rollouts(math.nan, 0.0).require_scores()
    with pytest.raises(RuntimeError, match="None of 2 responses could be scored"):
        rollouts(math.nan, math.nan).require_scores()


def test_an_evaluation_without_its_judge_fails_and_keeps_responses_and_other_scores(runs):
    _, _, process, out = runs
    assert process.returncode == 1, process.stdout[-3000:]
    assert "reward harmbench_refusal failed for all of its responses" in process.stdout
    assert "probe failed: harmbench_refusal scored no response; the reason is above." in process.stdout
    assert [file.name for file in out.rglob("*.json*")] == ["samples.jsonl"], "no result that would be taken for one"
    kept = samples(out / "probe" / "samples.jsonl")
    assert {task: len(rows) for task, rows in kept.items()} == PROMPTS
    assert all(row["response"] and row["reward"] is None for row in kept["harmbench"])
    assert all(row["reward"] is not None for row in kept["strongreject"] + kept["normal"])


def test_at_temperature_0_responses_are_those_of_greedy_decoding(runs, tiny):
    *_, out = runs
    model, tokenizer = (cls.from_pretrained(tiny["policy"]) for cls in (AutoModelForCausalLM, AutoTokenizer))
    for row in samples(out / "probe" / "samples.jsonl")["normal"]:
        ids = torch.tensor([tokenizer.encode(row["prompt"], add_special_tokens=False)])
        written = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert tokenizer.decode(written) == row["response"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"samples": 2}, r"probe\.samples=2: with probe\.temperature=0 all would be the same"),
        ({"temperature": -1.0}, r"probe\.temperature=-1\.0 must be a number at least 0\.01, or 0"),
        ({"top_p": 0.9}, r"probe\.top_p=0\.9 needs probe\.temperature=1, but it is 0\.0"),
        ({"reward": ["judged"]}, r"reward\.judged\.tasks: no example has task 'strongreject'; the data has harmbench"),
    ],
)
def test_a_probe_that_cannot_work_is_a_sentence_before_the_model_loads(tiny, changes, sentence):
    source = SourceConfig(path=str(FILES["harmbench"]), prompt="Behavior", task="harmbench", sample=2)
    rewards = {
        "all": RewardConfig(target="length", args={"max": 9}),
        "judged": RewardConfig(target="length", tasks=["strongreject"], args={"max": 9}),
    }
    chosen = {name: rewards[name] for name in ["all", *changes.pop("reward", [])]}
    probe = RewardProbeConfig(prompts=[source], reward=chosen, **{"temperature": 0.0} | changes)
    with pytest.raises(ConfigError, match=sentence):
        check_reward_probe(probe, "float32")
