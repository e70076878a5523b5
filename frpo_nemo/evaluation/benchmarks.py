"""The standard benchmarks: the task of lm-eval or evalplus, and its settings.

Every setting that changes a score is written out below rather than left to the tool's files. Prompts, data,
generation and scoring are the tools' own.
"""

from __future__ import annotations

from dataclasses import dataclass

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."

# How answers are generated in lm-eval's tasks. A task's own stop strings may belong to its few-shot text ("Problem:" of
# minerva cuts answers that restate the problem), and with hf a model's generation_config.json would add a repetition penalty.
GREEDY = {"until": [], "do_sample": False, "temperature": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Benchmark:
    tool: str  # the package: lm_eval or evalplus
    task: str  # its name there
    shown: tuple[str, ...]  # scores for the table, the main one first
    answer_tokens: int | None  # the longest answer; None: answers are chosen by their probability, not written
    fewshot: int = 0
    chat: bool = True  # prompts go through the model's chat template
    system: str | None = None
    parses_latex: bool = False  # needs antlr4 4.11


# math500, mbpp_plus: as the FRPO paper evaluates. mmlu: 5-shot without chat template, as in most published numbers.
# evalplus has no option for the length of answers.
BENCHMARKS = {
    "math500": Benchmark("lm_eval", "minerva_math500", ("math_verify",), 2048, system=BOXED, parses_latex=True),
    "mbpp_plus": Benchmark("evalplus", "mbpp", ("pass@1", "base_pass@1"), 768),
    "humaneval_plus": Benchmark("evalplus", "humaneval", ("pass@1", "base_pass@1"), 768),
    "mmlu": Benchmark("lm_eval", "mmlu", ("acc",), None, fewshot=5, chat=False),
    "ifeval": Benchmark("lm_eval", "ifeval", ("prompt_level_strict_acc", "inst_level_strict_acc"), 1280),
}
