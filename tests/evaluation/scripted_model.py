"""A model with scripted answers, and a few local documents for every benchmark.

The end of each question and the whole of each answer are tokens of its tokenizer. Attention and MLP add nothing, and the
output layer maps the last token to the next one, so the model answers in one token and ends.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
import yaml
from tiny_models import CHAT_TEMPLATE, make_tiny, tiny_tokenizer

LM_EVAL = Path(importlib.util.find_spec("lm_eval").origin).parent

# problem, solution, response
MATH = [
    ("2 + 2?", r"\boxed{4}", r"\boxed{4}"),
    ("3 + 2?", r"\boxed{5}", "**Problem:** 3 + 2?\n\n**Solution:** It is $\\boxed{5}$."),
    ("4 + 2?", r"\boxed{6}", "<think>Is it \\boxed{9}? No.</think>\n\nIt is $6$."),
    ("5 + 2?", r"\boxed{7}", r"It is $\boxed{7}$, and so on..."),
    ("6 + 2?", r"\boxed{8}", r"\boxed{4}"),
]
# prompt, instruction, its arguments, response
IFEVAL = [
    ("Write no comma.", "punctuation:no_comma", {}, "I will not..."),
    ("Write of rain.", "keywords:existence", {"keywords": ["rain"]}, "Problem: write of it.\n\nSolution: rain falls."),
    ("Think, no comma.", "punctuation:no_comma", {}, "<think>Well, let me see,</think>\n\nDone."),
]
MMLU = 2  # questions, of which the first has the answer A, the model's to all
CODE = ["int(text)", "int(text) % 3"]  # of which f=int passes 2 and 1 tests
ENDLESS = "Never ends."  # answer to a third problem: the model then writes x forever
LONGER = "A prompt that is longer in tokens than those before. " * 6 + ENDLESS


def scripted_model(path: Path) -> Path:
    """Write the model to `path`, with a chat template that shows whether it is to think."""
    from evalplus.provider.utility import make_raw_chat_prompt
    from transformers import AddedToken, AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking %}(think)\n{% endif %}" + CHAT_TEMPLATE
    endless = make_raw_chat_prompt(_problem(len(CODE), "0", LONGER)["prompt"], "", _RESPONSE_PREFIX, tokenizer)
    script = {f"{question}\n\nSolution:\na:": response for question, _, response in MATH}
    script |= {f"{question}\na:": response for question, _, _, response in IFEVAL}
    script |= {endless[endless.index(ENDLESS) :]: "x", "x": "x", "\n": "f=int", " ": "A"}
    words = sorted({*script, *script.values()})
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words if len(word) > 1])
    make_tiny(path, "llama", layers=1, vocab=len(tokenizer), max_position_embeddings=4096)
    tokenizer.save_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
                parameter.zero_()
        for direction, word in enumerate(words):
            following = tokenizer.convert_tokens_to_ids(script.get(word, tokenizer.eos_token))
            model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word), direction] = 1
            model.lm_head.weight[following, direction] = 1
        model.model.norm.weight.fill_(1)
    model.save_pretrained(path)
    return path


def write_documents(directory: Path) -> dict[str, str]:
    """Write the documents, and lm-eval's tasks that read them, to `directory`. Returns the environment in which evalplus
    reads its own: HumanEval's are there, MBPP's file is missing."""
    problems = [{"problem": problem, "solution": solution} for problem, solution, _ in MATH]
    _write_task(directory, "minerva_math/minerva_math500.yaml", test=problems)
    instructions = [
        {"key": key, "prompt": prompt, "instruction_id_list": [name], "kwargs": [{"keywords": None, **arguments}]}
        for key, (prompt, name, arguments, _) in enumerate(IFEVAL)
    ]
    _write_task(directory, "ifeval/ifeval.yaml", train=instructions)
    questions = [{"question": f"Number {n}?", "choices": ["k", "l", "m", "n"], "answer": n % 4} for n in range(5)]
    _write_task(directory, "mmlu/default/mmlu_anatomy.yaml", test=questions[:MMLU], dev=questions)
    group = yaml.safe_load((LM_EVAL / "tasks/mmlu/default/_mmlu.yaml").read_text())
    (directory / "mmlu.yaml").write_text(json.dumps(group | {"task": ["mmlu_anatomy"]}))
    problems = [_problem(index, solution, "") for index, solution in enumerate(CODE)]
    _write_lines(directory / "code.jsonl", [*problems, _problem(len(CODE), "0", LONGER)])
    return {
        "XDG_CACHE_HOME": str(directory / "cache"),
        "HUMANEVAL_OVERRIDE_PATH": str(directory / "code.jsonl"),
        "MBPP_OVERRIDE_PATH": str(directory / "missing.jsonl"),
    }


def _problem(index: int, solution: str, comment: str) -> dict:
    tests = {"base_input": [["1"]], "plus_input": [["4"]], "atol": 0}
    own = {"task_id": f"HumanEval/{index}", "prompt": f'def f(text):\n    """The number. {comment}"""\n'}
    return own | tests | {"canonical_solution": f"    return {solution}\n", "entry_point": "f", "contract": ""}


def _write_task(directory: Path, theirs: str, **splits: list[dict]) -> None:
    """lm-eval's own task with local documents."""
    name, files = Path(theirs).stem, {}
    for split, rows in splits.items():
        files[split] = str(directory / f"{name}_{split}.jsonl")
        _write_lines(directory / f"{name}_{split}.jsonl", rows)
    local = {"dataset_path": "json", "dataset_name": None}
    local["dataset_kwargs"] = {"data_files": files, "cache_dir": str(directory / "cache")}
    (directory / f"{name}.yaml").write_text(json.dumps({"include": str(LM_EVAL / "tasks" / theirs), **local}))


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


_RESPONSE_PREFIX = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
