"""Benchmarks are lm-eval's and evalplus's own, started with the settings that docs/evaluation.md lists, and their scores
come back as numbers. The settings are read back from what the tools write: a default of theirs that comes back shows.
"""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_model import IFEVAL, MATH, scripted_model, write_documents

from frpo_nemo.config.load import load
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_checks import check_model
from frpo_nemo.evaluation.benchmark_commands import command_line
from frpo_nemo.evaluation.benchmark_runs import read_scores
from frpo_nemo.evaluation.benchmarks import BENCHMARKS, BOXED
from frpo_nemo.evaluation.evaluate import evaluate
from frpo_nemo.evaluation.options import EvaluateRun

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "evaluate.py"
DOCUMENTATION = (ROOT / "docs" / "evaluation.md").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Return a model whose path is longer than a file name may be."""
    return scripted_model(tmp_path_factory.mktemp("run") / ("a" * 130) / ("b" * 130) / "hf")


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Return (the directory of lm-eval's tasks, the environment of evalplus)"""
    directory = tmp_path_factory.mktemp("documents")
    return directory, write_documents(directory)


def run_of(model: Path, documents: Path, out: Path, *names: str, **options) -> EvaluateRun:
    own = {"backend": "hf", "dtype": "float32", "include_path": str(documents), "enable_thinking": False}
    return load(EvaluateRun, {"model": {"path": str(model)}, "out": str(out), "benchmarks": [*names], **own, **options})


@pytest.fixture(scope="module")
def evaluated(model, documents, tmp_path_factory, request) -> tuple[subprocess.CompletedProcess, Path]:
    """Return (finished process, out) of the recipe. There are no documents for MBPP+."""
    out = tmp_path_factory.mktemp("evaluated")
    options = ["backend=hf", "dtype=float32", "enable_thinking=false", f"include_path={documents[0]}"]
    arguments = [f"model.path={model.parent}", "benchmarks=[mbpp_plus,math500,humaneval_plus]", f"out={out}", *options]
    command, environment = [sys.executable, str(RECIPE), *arguments], os.environ | documents[1]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, env=environment, cwd=RECIPE.parent, **streams)
    request.getfixturevalue("study")  # which the next files need, on the other core
    printed, _ = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, printed), out


@pytest.fixture(scope="module")
def asked(model, documents, evaluated, tmp_path_factory) -> Path:
    """Where lm-eval writes about math500, which the recipe ran, and in this process about the others."""
    out = tmp_path_factory.mktemp("asked")
    (out / "math500").symlink_to(evaluated[1] / "math500")
    for name in ("mmlu", "ifeval"):
        lm_eval(run_of(model, documents[0], out, name), model)
    return out


@pytest.fixture(scope="module")
def thoughtful(model, documents, tmp_path_factory) -> Path:
    """Return what lm-eval writes about a model that thinks."""
    options = {"enable_thinking": True, "think_end_token": "</think>", "max_gen_tokens": 9}
    cfg = run_of(model, documents[0], tmp_path_factory.mktemp("thoughtful"), "ifeval", **options)
    lm_eval(cfg, model)
    return Path(cfg.out)


def lm_eval(cfg: EvaluateRun, model: Path) -> None:
    """The benchmark of cfg by lm-eval's own command line, without the seconds that a process takes to start."""
    from lm_eval._cli.harness import HarnessCLI

    cli, command = HarnessCLI(), command_line(cfg, cfg.benchmarks[0], model)
    cli.execute(cli._parser.parse_args(command[command.index("run") :]))


# -- scores


def test_scores_come_from_the_tools(evaluated):
    """A response that restates its problem or ends in an ellipsis is right; one that thinks is judged by its thoughts."""
    process, out = evaluated
    scores = json.loads((out / "results.json").read_text())
    right = [1, 1, 0, 1, 0]
    assert scores["math500/math_verify"] == 3 / 5, process.stdout
    assert scores["math500/math_verify_stderr"] == pytest.approx(statistics.stdev(right) / 5**0.5)
    assert scores["math500/exact_match"] == 0
    assert (scores["humaneval_plus/base_pass@1"], scores["humaneval_plus/pass@1"]) == (2 / 3, 1 / 3)


def test_scores_are_read_from_what_lm_eval_writes(asked):
    ifeval = read_scores("ifeval", asked / "ifeval")
    assert (ifeval["prompt_level_strict_acc"], ifeval["inst_level_strict_acc"]) == (2 / 3, 2 / 3)
    assert "inst_level_strict_acc_stderr" not in ifeval
    assert read_scores("mmlu", asked / "mmlu") == {"acc": 0.5, "acc_stderr": 0.5}


@pytest.mark.parametrize("name, answers", [("math500", MATH), ("ifeval", IFEVAL)])
def test_every_response_is_judged_whole(name, answers, asked):
    assert {sample["resps"][0][0] for sample in samples(asked, name)} == {response for *_, response in answers}


def test_thoughts_are_not_judged_where_their_end_is_named(thoughtful):
    assert read_scores("ifeval", thoughtful / "ifeval")["prompt_level_strict_acc"] == 1
    assert "Done." in {sample["resps"][0][0] for sample in samples(thoughtful, "ifeval")}


def test_a_benchmark_that_fails_is_told_and_the_others_go_on(evaluated):
    process, out = evaluated
    assert process.returncode == 1
    assert "mbpp_plus failed: exit code 1; the end of" in process.stdout
    assert "missing.jsonl" in process.stdout.split("math500:")[0]
    assert not (out / "mbpp_plus" / "result.json").exists()
    assert not any(key.startswith("mbpp_plus") for key in json.loads((out / "results.json").read_text()))


# -- settings


def samples(out: Path, name: str) -> list[dict]:
    """Return what lm-eval writes about every document."""
    (file,) = (out / name).glob("samples_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def documented(name: str) -> dict[str, str]:
    """Return the row of a benchmark in the documentation."""
    table = DOCUMENTATION[DOCUMENTATION.index("| `benchmarks` | task") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return dict(zip(rows[0], next(row for row in rows if row[0] == f"`{name}`"), strict=True))


@pytest.mark.parametrize("name", ["math500", "ifeval", "mmlu"])
def test_lm_eval_reports_the_settings_that_are_documented(name, asked):
    (file,) = (asked / name).glob("lm_eval_*.json")
    result = json.loads(file.read_text())
    ((task, config),) = result["configs"].items()
    metric = documented(name)["main score"].strip("`")
    scores, shots = result["results"]["mmlu" if name == "mmlu" else task], result["n-shot"][task]
    assert isinstance(scores[f"{metric},none"], float) and isinstance(scores[f"{metric}_stderr,none"], float)
    told = {"`benchmarks`": f"`{name}`", "main score": f"`{metric}`", "shots": str(shots)}
    told["chat template"] = "yes" if result["chat_template"] else "no"
    if config["output_type"] == "multiple_choice":
        assert config["doc_to_choice"] == ["A", "B", "C", "D"] and task == "mmlu_anatomy" and "mmlu" in result["groups"]
        told |= {"task": "lm-eval, `mmlu`", "standard error": "pooled over subjects"}
        told |= {"stop strings": "", "longest answer": "the likeliest of A to D", "decoding": ""}
    else:
        generation = config["generation_kwargs"]
        told |= {"task": f"lm-eval, `{task}`", "standard error": "of the mean", "decoding": "greedy"}
        told |= {"stop strings": "none", "longest answer": f"{generation.pop('max_gen_toks'):,} tokens"}
        assert generation == {"until": [], "do_sample": False, "temperature": 0.0, "repetition_penalty": 1.0}
        assert result["system_instruction"] == BENCHMARKS[name].system
    assert documented(name) == told
    assert result["config"]["batch_size"] == "1"


def test_evalplus_reports_the_settings_that_are_documented(evaluated):
    """The model writes x forever after a prompt that ends as evalplus's does with a chat template."""
    directory, row = evaluated[1] / "humaneval_plus", documented("humaneval_plus")
    log, (raw,) = (directory / "benchmark.log").read_text(), (directory / "humaneval").glob("*.raw.jsonl")
    endless = json.loads(raw.read_text().splitlines()[-1])["solution"]
    assert set(endless) == {"x"} and row["longest answer"] == f"{len(endless)} tokens"
    assert "Greedy decoding ON" in log and row["decoding"] == "greedy"
    stops = ast.literal_eval(re.search(r"^self\.eos = (\[.*\])$", log, re.MULTILINE)[1])
    shown = re.search(r"^\*\*evalplus\*\* .*?stops at (.*?)\. Neither", DOCUMENTATION, re.DOTALL | re.MULTILINE)[1]
    assert row["stop strings"] == "evalplus's" and set(re.findall(r"`('[^']+')`", shown)) == set(map(repr, stops))
    scores = json.loads((directory / "result.json").read_text())["scores"]
    assert set(scores) == {"pass@1", "base_pass@1"} and row["standard error"] == "none"
    different = {"`benchmarks`": "`mbpp_plus`", "task": "evalplus, `mbpp`"}
    assert documented("mbpp_plus") == row | different


def test_the_model_sees_its_chat_template_and_the_instruction(asked, thoughtful):
    def prompt(out: Path, name: str) -> str:
        return samples(out, name)[0]["arguments"]["gen_args_0"]["arg_0"]

    assert prompt(asked, "math500") == f"s:{BOXED}\nu:Problem:\n2 + 2?\n\nSolution:\na:"
    assert prompt(asked, "ifeval") == "u:Write no comma.\na:"
    assert prompt(thoughtful, "ifeval") == "(think)\nu:Write no comma.\na:"


@pytest.mark.parametrize(
    "lost, code",
    [
        ("@cache", "from functools import cache\n@cache\ndef f(x):\n    return x"),
        (
            "class A",
            "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x):\n    return A(x).x",
        ),
        ("A, B = 1, 2", "A, B = 1, 2\ndef f(x):\n    return A + B"),
        ("yield", "def g(x):\n    yield x\ndef f(x):\n    return list(g(x))"),
        ("return 2", "def f(x):\n    return 1\ndef f(x):\n    return 2"),
        ("A += 1", "A = 1\nA += 1\ndef f(x):\n    return A"),
    ],
)
def test_evalplus_scores_what_its_sanitiser_leaves(lost, code):
    from evalplus.sanitize import sanitize

    kept = "class B:\n    y = 1\nC = 2\ndef g(x):\n    return B.y + C\ndef f(x):\n    return g(x)"
    assert sanitize(kept, "f") == kept
    assert lost in code and lost not in sanitize(code, "f")


# -- started again


@pytest.fixture
def again(model, documents, evaluated):
    """Return the configuration of math500, as it was run, with other options."""
    return lambda **options: run_of(model, documents[0], evaluated[1], "math500", **options)


def test_what_is_finished_is_not_repeated(again, capsys):
    log = Path(again().out) / "math500" / "benchmark.log"
    before = log.stat().st_mtime_ns
    assert evaluate(again())
    shown = capsys.readouterr().out
    assert "math500: finished before" in shown and "0.600" in shown
    assert log.stat().st_mtime_ns == before


def test_results_of_other_settings_or_weights_are_not_mixed(again, model):
    with pytest.raises(ConfigError, match="math500/result.json is a result with limit=None, not 5; choose another out"):
        check_model(again(limit=5))
    with pytest.raises(ConfigError, match="is a result with think_end_token=None, not </think>"):
        check_model(again(enable_thinking=True, think_end_token="</think>", max_gen_tokens=2048))
    weights = model / "model.safetensors"
    times = weights.stat().st_atime_ns, weights.stat().st_mtime_ns
    os.utime(weights)
    with pytest.raises(ConfigError, match="is a result with other weights"):
        check_model(again())
    os.utime(weights, ns=times)
    check_model(again())


def test_a_result_with_the_stop_strings_of_the_task_is_not_taken(again):
    """Results that name no stop strings are from before the settings were written out."""
    file = Path(again().out) / "math500" / "result.json"
    before = file.read_text()
    result = json.loads(before)
    del result["settings"]["until"]
    file.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"is a result with until=None, not \[\]"):
        check_model(again())
    file.write_text(before)
