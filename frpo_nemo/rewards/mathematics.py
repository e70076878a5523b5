"""The built-in `math` reward. A module of its own, so that workers import math-verify before the clock
starts."""

from __future__ import annotations

import logging

from math_verify import parse, verify

from frpo_nemo.rewards.builtin import after_hashes

# It warns once per process that its alarm is off; the worker pool has the clock.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math_answer(prompts, completions: list[str], *, column: str = "answer", **columns) -> list[float]:
    """1 where the completion's final answer equals the gold one as mathematics (math-verify), else 0.

    The final answer is what follows the last `####`, else whatever math-verify extracts (\\boxed{} before the
    last number). Gold answers may be GSM8K's (`... #### 72`), text with LaTeX in $ or \\boxed{}, or bare
    LaTeX. Runs in worker processes always: simplification can take for ever, and math-verify's own time limit
    is an alarm signal, which works in a main thread only. Raises ValueError on a gold answer that cannot be
    parsed.
    """
    scores = []
    for completion, gold in zip(completions, columns[column], strict=True):
        expected = parse(_delimited(after_hashes(str(gold))), parsing_timeout=None)
        if not expected:
            raise ValueError(f"gold answer {str(gold)[:80]!r} of column '{column}' holds no mathematics")
        answer = parse(after_hashes(completion), parsing_timeout=None)
        scores.append(float(verify(expected, answer, timeout_seconds=None)))
    return scores


def _delimited(gold: str) -> str:
    # Bare LaTeX is only recognised between delimiters: 108 of MATH-500's gold answers are lost without.
    if "\\boxed" in gold or gold.count("$") > 1:
        return gold
    bare = gold.replace("\\$", "").replace("$", "")  # also the sign of dollars
    return f"\\boxed{{{bare}}}"
