"""Tests of what counts as a secret, and that messages, commands and results contain none."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from frpo_nemo import redact
from frpo_nemo.config.option import options_of
from frpo_nemo.config.options import FRPORun, RewardConfig, SFTRun
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.options import EvaluateRun, RewardProbeConfig
from frpo_nemo.evaluation.reward_probe import probe_settings
from frpo_nemo.rewards.registry import Failure, bind, call_batch
from frpo_nemo.study.parts import PartConfig, StudyConfig
from frpo_nemo.study.run import ForgettingStudy
from frpo_nemo.training import start_record

ROOT = Path(__file__).resolve().parents[2]
SECRET = "s3cr3t-value"


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    monkeypatch.setattr(redact, "_known", set())


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "apiKey",
        "X-Api-Key",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "token",
        "password",
        "Authorization",
        "client_secret",
    ]
    + ["reward.judge.args.access_token", "++reward.judge.args.api_key", "AWS_SECRET_ACCESS_KEY", "credentials"]
    + ["api_keys", "api_key2", "OPENAI_API_KEY_2", "passwords", "access_tokens", "db_pass", "DB_PWD", "account_key"]
    + ["signing_key", "ssh_key", "openai_key", "encryption_keys"],
)
def test_a_name_may_say_that_its_value_is_secret(name):
    assert redact.is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["tokens", "eos_token", "stop_token", "key", "keys", "api_key_env", "secretary", "", "7", "PWD", "forward_pass"]
    + ["max_tokens", "microbatch_tokens", "response_tokens", "tokens_per_second", "keep_last"],
)
def test_not_every_token_and_key_is_secret(name):
    assert not redact.is_secret(name)


@pytest.mark.parametrize("schema", [FRPORun, SFTRun])
def test_no_option_of_ours_is_taken_for_a_secret(schema):
    assert [each.key for each in options_of(schema) if redact.is_secret(each.key)] == []


@pytest.mark.parametrize(
    "text, shown",
    [
        ("reward.judge.args.api_key=abc is wrong", "reward.judge.args.api_key=REDACTED is wrong"),
        ("judge.args={'token': 'a b', 'n': 1}", "judge.args={'token': REDACTED, 'n': 1}"),
        ("Authorization: Bearer abc", "Authorization: REDACTED"),
        ("cannot read x: password=abc", "cannot read x: password=REDACTED"),
        ("https://me:abc@host/a@b and ssh://abc@host", "https://REDACTED@host/a@b and ssh://REDACTED@host"),
        ("GET https://host/?q=1&access_token=abc&n=2", "GET https://host/?q=1&access_token=REDACTED&n=2"),
        ("GET https://host/?sv=1&sig=abc%3D&n=2", "GET https://host/?sv=1&sig=REDACTED&n=2"),
        ("hf_abcdefghijklmnopqrst refused", "REDACTED refused"),
        ("github_pat_11ABCDEFG0abcdefghijk or ASIAABCDEFGHIJKLMNOP", "REDACTED or REDACTED"),
        ("nvapi-abcdefghijklmnopqrst or glpat-abcdefghijklmnopqrst", "REDACTED or REDACTED"),
        (
            "args={'api_keys': ['a', 'b'], 'n': 1} API_KEY_2=abc",
            "args={'api_keys': REDACTED, 'n': 1} API_KEY_2=REDACTED",
        ),
        ("api_key=${oc.env:KEY} token=null", "api_key=${oc.env:KEY} token=null"),
        ("eos_token=5 max_tokens=7 at https://host/x", "eos_token=5 max_tokens=7 at https://host/x"),
    ],
)
def test_texts(text, shown):
    assert redact.text(text) == shown


def test_values_of_secret_variables_and_options_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "from-the-environment")
    redact.remember({"judge": {"args": {"password": SECRET, "max_tokens": 123456, "token": True}}})
    assert redact.text(f"{SECRET} or from-the-environment, 123456") == "REDACTED or REDACTED, 123456"


def test_configurations_keep_their_shape():
    nested = {
        "args": {"api_key": 12, "headers": {"auth": ["a", "b"]}, "token": None},
        "path": "s3://u:p@b",
        "url": "az://b?password=p",
        "n": [1, 2],
    }
    shown = {"api_key": "REDACTED", "headers": {"auth": ["REDACTED", "REDACTED"]}, "token": None}
    assert redact.values(nested) == {
        "args": shown,
        "path": "s3://REDACTED@b",
        "url": "az://b?password=REDACTED",
        "n": [1, 2],
    }


def test_the_given_command_that_resumes_has_no_secret_however_the_shell_quotes_it(monkeypatch):
    """Nothing else of it changes. bash, whose quotes these are, reads the words for the comparison."""
    secrets = ["api_key=it's mine", "password=a\nb's", 'token=a "b" c', "judge.token=plain"]
    quoted = subprocess.check_output(["bash", "-c", 'echo "${@@Q}"', "bash", *secrets], text=True).strip()
    before, after = "cd '/a b' && sbatch --nodes=2 'job 1.sh' data='x y'", "$'n=1\\t' run_dir=runs/1  # soon"
    monkeypatch.setenv("FRPO_RESUME_COMMAND", f"{before} {quoted} {after}")
    hidden = "api_key=REDACTED password=REDACTED token=REDACTED judge.token=REDACTED"
    assert start_record.resume_command() == f"{before} {hidden} {after}"


def test_an_error_sentence_has_no_secret():
    assert SECRET not in str(ConfigError(f"Unknown key reward.judge.args.api_key={SECRET}"))


def test_what_a_reward_says_when_it_fails_has_no_secret():
    def judge(completions, api_key, **columns):
        raise PermissionError(f"key {api_key} is not valid")

    sys.modules[__name__].judge = judge
    reward = bind(f"{__name__}.judge", {"api_key": SECRET})
    assert call_batch(reward, ["p"], ["c"], {}) == [Failure("error", "PermissionError: key REDACTED is not valid")]


def test_the_console_of_a_recipe_that_fails_has_no_secret(tmp_path):
    """A mistake in the configuration, found after the secret was read; and an exception that nobody caught."""
    reward = tmp_path / "judge.py"
    reward.write_text("def judge(completions, api_key, **columns):\n    return [0.0 for _ in completions]\n")
    options = [f"reward.judge.target={reward}:judge", f"reward.judge.args.api_key={SECRET}", "run_dir=x"]
    options += ["model.path=there/is/none", "data=toy_prompts", "objective=frpo", "objective.lambda_=1", "optim.lr=1"]
    options += ["rollout.prompts_per_step=1", "rollout.max_response_tokens=4", "trainer.max_steps=1"]
    for more in (
        [],
        [f"reward.judge.args.x.api_key.y={SECRET}", "reward.judge.args.api_keyy=1", "reward.judge.nope=1"],
    ):
        command = [sys.executable, ROOT / "recipes/frpo.py", *options, *more]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 2 and result.stderr.startswith("frpo.py: "), result.stderr
        assert SECRET not in result.stdout + result.stderr
    uncaught = (
        "from frpo_nemo import redact; from frpo_nemo.config import cli; import sys\n"
        f"redact.remember({{'token': {SECRET!r}}}); cli._hide_secrets_in_tracebacks()\n"
        "import threading; secret = 's3cr3t' + '-value'\n"
        "def fail(): raise RuntimeError(secret)\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join(); fail()"
    )
    result = subprocess.run([sys.executable, "-c", uncaught], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("RuntimeError: REDACTED\n") == 2, result.stderr
    assert SECRET not in result.stderr


def test_a_study_and_an_evaluation_write_no_secret_down(tmp_path):
    """The part fails at once, because its configuration is wrong: what is written of it is the same."""
    secret = f"reward.judge.args.api_key={SECRET}"
    part = PartConfig(recipe="frpo", overrides=[secret, "no.such.key=1"])
    study = StudyConfig(out=str(tmp_path), arms={"a": []}, tasks={"t": part}, model="none", train=part)
    rows = ForgettingStudy(study, lambda recipe, arguments: None).run()
    assert [row["status"] for row in rows] == ["failed"]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"train.log", "results.jsonl"} <= {file.name for file in files}
    for file in files:
        assert SECRET not in file.read_text(), file
    assert "api_key=REDACTED" in shlex.join(rows[0]["arguments"])

    probe = RewardProbeConfig(reward={"judge": RewardConfig(target="length", args={"api_key": SECRET})})
    cfg = EvaluateRun(probe=probe)
    assert asdict(probe)["reward"]["judge"]["args"]["api_key"] == SECRET
    assert SECRET not in json.dumps(probe_settings(cfg)) and re.search("REDACTED", json.dumps(probe_settings(cfg)))
