"""What benchmarks ask of lm-eval and evalplus, as these read it, and the mistakes that are found before one starts."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import json
import logging
import runpy
import sys
from pathlib import Path

import fire
import pytest
from scripted_model import LM_EVAL
from tiny_models import CHAT_TEMPLATE, make_tiny

from frpo_nemo.config.load import load
from frpo_nemo.errors import ConfigError
from frpo_nemo.evaluation.benchmark_checks import check_benchmarks, check_model, model_directory
from frpo_nemo.evaluation.benchmark_commands import command_line
from frpo_nemo.evaluation.benchmarks import BENCHMARKS, BOXED, GREEDY
from frpo_nemo.evaluation.evaluate import evaluate
from frpo_nemo.evaluation.options import EvaluateRun
from frpo_nemo.evaluation.strict_lm_eval import EndAtWarning

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluate.py"
THINKS = "{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}" + CHAT_TEMPLATE


def config(model, out, *names, **options) -> EvaluateRun:
    return load(EvaluateRun, {"model": {"path": str(model)}, "out": str(out), "benchmarks": list(names), **options})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Path(make_tiny(tmp_path_factory.mktemp("run") / "hf", "llama", layers=1, max_position_embeddings=4096))


def copy_of(model: Path, to: Path, template: str | None = CHAT_TEMPLATE, **changes) -> Path:
    """Return the model with another chat template or other settings in config.json."""
    to.mkdir()
    for file in model.iterdir():
        (to / file.name).symlink_to(file)
    for name, text in (
        ("chat_template.jinja", template),
        ("config.json", json.dumps(json.loads((model / "config.json").read_text()) | changes)),
    ):
        (to / name).unlink()
        if text is not None:
            (to / name).write_text(text)
    return to


def lm_eval_reads(command: list[str]):
    """Return what lm-eval's own parser and configuration make of a command line."""
    from lm_eval._cli.harness import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    assert command[:3] == [sys.executable, "-m", "frpo_nemo.evaluation.strict_lm_eval"]
    return EvaluatorConfig.from_cli(HarnessCLI()._parser.parse_args(command[3:]))


def test_math500_is_asked_as_in_the_paper(model):
    cfg = config(model, "out", "math500", tensor_parallel_size=4)
    read = lm_eval_reads(command_line(cfg, "math500", model))
    assert (read.model, read.tasks, read.num_fewshot) == ("vllm", ["minerva_math500"], 0)
    assert read.apply_chat_template is True and read.system_instruction == BOXED
    assert read.gen_kwargs == GREEDY | {"max_gen_toks": 2048} and GREEDY["until"] == []
    assert read.model_args == {"pretrained": str(model), "dtype": "bfloat16", "tensor_parallel_size": 4}
    assert read.batch_size == "auto" and read.limit is None


def test_mmlu_and_ifeval_have_their_usual_settings(model):
    cfg = config(model, "out", "mmlu", "ifeval", limit=5, max_model_len=4096, backend="hf", batch_size=8)
    mmlu, ifeval = (lm_eval_reads(command_line(cfg, name, model)) for name in cfg.benchmarks)
    assert (mmlu.num_fewshot, mmlu.apply_chat_template, mmlu.gen_kwargs) == (5, False, {})
    assert (ifeval.num_fewshot, ifeval.apply_chat_template, ifeval.system_instruction) == (0, True, None)
    assert ifeval.gen_kwargs == GREEDY | {"max_gen_toks": 1280}
    for read in (mmlu, ifeval):
        assert read.limit == 5 and read.batch_size == "8"
        assert read.model_args == {"pretrained": str(model), "dtype": "bfloat16", "max_length": 4096}


def test_a_longer_answer_can_be_allowed(model):
    cfg = config(model, "out", "math500", "ifeval", max_gen_tokens=3000)
    for name in cfg.benchmarks:
        assert lm_eval_reads(command_line(cfg, name, model)).gen_kwargs["max_gen_toks"] == 3000


def test_with_hf_one_question_is_asked_at_a_time(model):
    """lm-eval's auto would first run 64 sequences of the whole context, five times."""
    assert lm_eval_reads(command_line(config(model, "out", "mmlu", backend="hf"), "mmlu", model)).batch_size == "1"
    with pytest.raises(ConfigError, match="batch_size=auto must be a whole number at least 1, or null"):
        config(model, "out", "mmlu", backend="hf", batch_size="auto")


@pytest.mark.parametrize("backend", ["vllm", "hf"])
def test_a_model_that_thinks_is_told_so_where_it_writes(model, backend):
    thinking = {"think_end_token": "</think>", "enable_thinking": True}
    cfg = config(model, "out", "math500", "ifeval", "mmlu", max_gen_tokens=9, backend=backend, **thinking)
    *writing, mmlu = (lm_eval_reads(command_line(cfg, name, model)).model_args for name in cfg.benchmarks)
    for read in writing:
        assert thinking.items() <= read.items()
    assert not thinking.keys() & mmlu.keys()  # with which lm-eval refuses to compare answers


def test_lm_eval_has_the_tasks_and_its_vllm_backend_the_arguments(model):
    from lm_eval.tasks import TaskManager

    tasks = [LM_EVAL / "tasks" / name for name in ("minerva_math", "mmlu/default", "ifeval")]
    manager = TaskManager(include_path=tasks, include_defaults=False)
    names = {benchmark.task for benchmark in BENCHMARKS.values() if benchmark.tool == "lm_eval"}
    assert names <= set(manager.all_tasks)

    tree = ast.parse((LM_EVAL / "models" / "vllm_causallms.py").read_text())
    backend = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "VLLM")
    init = next(node for node in backend.body if getattr(node, "name", "") == "__init__")
    options = {"max_model_len": 100, "max_gen_tokens": 9, "think_end_token": "</think>", "enable_thinking": True}
    read = lm_eval_reads(command_line(config(model, "out", "ifeval", **options), "ifeval", model))
    assert set(read.model_args) <= {a.arg for a in init.args.args}


@pytest.mark.parametrize("name, dataset", [("mbpp_plus", "mbpp"), ("humaneval_plus", "humaneval")])
def test_evalplus_understands_its_command_line(name, dataset, model, tmp_path):
    from evalplus.codegen import run_codegen
    from evalplus.evaluate import evaluate

    command = command_line(config(model, tmp_path, name, tensor_parallel_size=2), name, model)
    assert command[:3] == [sys.executable, "-m", "evalplus.evaluate"]
    read = fire.Fire(lambda **flags: flags, command=command[3:])  # as evalplus reads it
    own = {"model": str(model), "dataset": dataset, "root": str(tmp_path / name), "backend": "vllm"}
    assert read == own | {"dtype": "bfloat16", "tp": 2, "greedy": True}
    assert set(read) <= set(inspect.signature(evaluate).parameters) | set(inspect.signature(run_codegen).parameters)


# -- what lm-eval would leave out of prompts


@pytest.fixture
def strict():
    handler, logger = EndAtWarning(), logging.getLogger("lm_eval")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def hf_backend(model):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(model), max_length=20, device="cpu")


def requests(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, 0)]


def test_a_prompt_that_would_be_cut_ends_lm_eval(hf_backend, strict):
    generation = GREEDY | {"max_gen_toks": 10}
    hf_backend.generate_until(requests("generate_until", "0123456789", generation))
    with pytest.raises(
        SystemExit, match=r"prompt and its answer do not fit.*truncating to last 10 tokens.*lower max_gen"
    ):
        hf_backend.generate_until(requests("generate_until", "0123456789a", generation))
    hf_backend.loglikelihood(requests("loglikelihood", "0123456789012345678", " A"))
    with pytest.raises(SystemExit, match=r"prompt and its answer do not fit.*Truncating \d tokens"):
        hf_backend.loglikelihood(requests("loglikelihood", "01234567890123456789", " A"))


def test_a_prompt_that_would_be_cut_ends_lm_eval_with_vllm(strict):
    """Test the function that cuts prompts for the backend, and its own message: without vllm the backend cannot be imported."""
    from lm_eval.models.utils import maybe_truncate

    assert maybe_truncate([1, 2, 3], max_gen_toks=7, max_model_len=10) == ([1, 2, 3], 7)
    with pytest.raises(SystemExit, match="prompt and its answer do not fit.*Truncating context from"):
        maybe_truncate([1, 2, 3, 4], max_gen_toks=7, max_model_len=10)
    backend = (LM_EVAL / "models" / "vllm_causallms.py").read_text()
    assert (
        "maybe_truncate(" in backend and '"Context length %s exceeds max length (%s). Truncating context.",' in backend
    )
    with pytest.raises(SystemExit, match="A prompt and its answer do not fit"):
        logging.getLogger("lm_eval.models").warning(
            "Context length %s exceeds max length (%s). Truncating context.", 9, 8
        )


def test_an_instruction_that_would_be_left_out_ends_lm_eval(hf_backend, strict):
    messages = [{"role": "system", "content": BOXED}, {"role": "user", "content": "2 + 2?"}]
    assert BOXED in hf_backend.apply_chat_template(messages)
    hf_backend.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    )
    with pytest.raises(SystemExit, match="refuses a system message"):
        hf_backend.apply_chat_template(messages)
    hf_backend.tokenizer.chat_template = CHAT_TEMPLATE


# -- mistakes


@pytest.mark.parametrize(
    "names, context, options, sentence",
    [
        (
            ["math500"],
            2048,
            {},
            "math500: answers of up to 2048 tokens leave no room .* max_position_embeddings is 2048; lower max_gen",
        ),
        (["math500"], 2049, {}, None),
        (["math500"], 2048, {"max_gen_tokens": 1000}, None),
        (
            ["mmlu", "ifeval"],
            4096,
            {"max_model_len": 1280},
            "ifeval: answers of up to 1280 tokens .* where max_model_len is 1280",
        ),
        (["math500"], 1024, {"max_model_len": 4096}, None),
        (["mmlu", "humaneval_plus"], 2047, {}, "humaneval_plus: evalplus uses a context of 2048 tokens, .* is 2047"),
        (["mmlu", "humaneval_plus"], 2048, {}, None),
    ],
)
def test_a_context_without_room_for_the_answers_is_refused(names, context, options, sentence, model, tmp_path):
    short = copy_of(model, tmp_path / "model", max_position_embeddings=context)
    expect(sentence, config(short, tmp_path / "out", *names, backend="hf", **options))


@pytest.mark.parametrize(
    "template, options, sentence",
    [
        (
            THINKS,
            {},
            "math500, ifeval: the chat template of .* lets a model think or not; set enable_thinking=true or false",
        ),
        (THINKS, {"enable_thinking": False}, None),
        (THINKS, {"enable_thinking": True}, "has thoughts, which would be judged .* think_end_token='</think>'"),
        (
            THINKS,
            {"enable_thinking": True, "think_end_token": "</think>"},
            "think_end_token=</think> needs max_gen_tokens",
        ),
        (THINKS, {"enable_thinking": True, "think_end_token": "</think>", "max_gen_tokens": 99}, None),
        (CHAT_TEMPLATE, {"enable_thinking": False}, "never reads enable_thinking=False; leave it out"),
        (CHAT_TEMPLATE + "{{ '</think>' }}", {}, "has thoughts, which would be judged"),
        (
            CHAT_TEMPLATE,
            {"think_end_token": "<eos>", "max_gen_tokens": 9},
            "<eos> is a special token of .* use backend=vllm",
        ),
        (None, {}, "math500, ifeval: the questions go through the model's chat template, and .* has none"),
    ],
)
def test_thoughts_are_never_judged_unasked(template, options, sentence, model, tmp_path):
    thinker = copy_of(model, tmp_path / "model", template)
    expect(sentence, config(thinker, tmp_path / "out", "math500", "mmlu", "ifeval", backend="hf", **options))
    expect(None, config(thinker, tmp_path / "out", "mmlu", "mbpp_plus", backend="hf", **options))


def expect(sentence: str | None, cfg: EvaluateRun) -> None:
    """check_model accepts cfg, or says `sentence`."""
    if sentence is None:
        assert check_model(cfg) == Path(cfg.model.path)
    else:
        with pytest.raises(ConfigError, match=sentence):
            check_model(cfg)


def test_the_recipe_checks_without_running(model, tmp_path, monkeypatch, capsys):
    def check(*options) -> int:
        own = [f"model.path={model}", f"out={tmp_path / 'out'}", "benchmarks=[math500]", "backend=hf"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--check", *own, *options])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(RECIPE), run_name="__main__")
        return end.value.code

    assert check() == 0 and capsys.readouterr().out == f"configuration OK for {model}\n"
    assert check("max_model_len=2048") == 2
    assert capsys.readouterr().err.startswith("evaluate.py: math500: answers of up to 2048 tokens leave no room")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "names, options, sentence",
    [
        (["math50"], {}, "there is no math50; the nearest is math500"),
        (["mbpp"], {}, "there is no mbpp; the nearest is mbpp_plus"),
        (["mmlu"], {"backend": "vlm"}, "backend=vlm must be one of vllm, hf .*did you mean vllm"),
        (["mmlu"], {"tensor_parallel_size": 2}, "tensor_parallel_size=2 is for backend=vllm"),
        (["mmlu"], {"limit": 0}, "limit=0 must be a whole number at least 1"),
        (["mmlu"], {"batch_size": 0}, "batch_size=0 must be a whole number at least 1"),
        (["mmlu", "mbpp_plus"], {"limit": 3}, "mbpp_plus cannot be limited"),
        (["mmlu"], {"include_path": "nowhere"}, "include_path=nowhere is not a directory"),
        (["math500"], {"antlr_path": "nowhere"}, "--target .*nowhere antlr4-python3-runtime==4.11.0"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(names, options, sentence, model, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        check_benchmarks(config(model, tmp_path, *names, **({"backend": "hf"} | options)))


def test_lm_eval_with_vllm_needs_a_package_of_that_name(model, tmp_path):
    cfg = config(model, tmp_path, "mmlu", backend="vllm")
    if list(importlib.metadata.distributions(name="vllm")):
        check_benchmarks(cfg)
    else:
        with pytest.raises(ConfigError, match="needs the package vllm, .*use backend=hf"):
            check_benchmarks(cfg)


def test_a_tool_that_is_missing_is_told_with_the_command_that_installs_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "mmlu", dataclasses.replace(BENCHMARKS["mmlu"], tool="lm_eval_of_tomorrow"))
    with pytest.raises(ConfigError, match=r"mmlu: lm_eval_of_tomorrow is not installed: pip install frpo-nemo\[eval\]"):
        check_benchmarks(config(model, tmp_path, "mmlu", backend="hf"))


def test_a_model_is_a_directory_or_the_export_of_a_run(model, tmp_path):
    assert model_directory(str(model)) == model_directory(str(model.parent)) == model
    with pytest.raises(ConfigError, match="has no config.json"):
        model_directory(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is a run directory without hf/"):
        model_directory(str(tmp_path))


def test_a_directory_of_something_else_is_never_emptied(model, tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "questions.csv").touch()
    with pytest.raises(ConfigError, match="mmlu exists and no earlier start wrote it"):
        evaluate(config(model, tmp_path, "mmlu", backend="hf"))
    assert (tmp_path / "mmlu" / "questions.csv").exists()
