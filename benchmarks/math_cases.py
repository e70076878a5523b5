"""Completions whose reward is known by construction: for a gold answer, the same answer in other spellings and places
(reward 1) and answers that nearly match (reward 0), each with the name of its kind.

Uses no grader, so that it can judge them all. The spellings are in math_spellings.py, wrong answers in
math_near_misses.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.math_near_misses import near_misses
from benchmarks.math_spellings import spellings

THOUGHT = "We work step by step. First, $2+2=4$.\n\n"
# The kinds on which graders may differ, and the reward that our grader gives.
DEBATABLE = {
    "bare percent": 1,
    "percent after ####": 0,
    "rounded to six decimals": 1,
    "rounded to two decimals": 0,
    "the base left out": 1,
    "the value in base ten": 0,
    "angle in radians": 0,
    "a point for a column vector": 1,
    "a point for a list": 0,
    "the other unit, converted": 0,
    "the letter and its choice": 1,
}


@dataclass(frozen=True)
class Case:
    kind: str
    completion: str
    reward: int


def cases(gold: str, *, after_hashes: bool = False) -> Iterator[Case]:
    """Return the cases of a gold answer, which is the answer alone. after_hashes: the gold column has it after `####`."""
    answers = {gold: "as it is"}
    for kind, text in spellings(gold):
        answers.setdefault(text, kind)
    for text, kind in answers.items():
        yield Case(kind, _boxed(text), DEBATABLE.get(kind, 1))
    yield from (Case(kind, text, 1) for kind, text in _places(gold, after_hashes))
    yield from (Case(kind, text, 0) for kind, text in _other_places(gold, after_hashes))
    wrong: dict[str, str] = {}
    for kind, text in near_misses(gold):
        if text not in answers:
            wrong.setdefault(text, kind)
    for text, kind in wrong.items():
        yield Case(kind, _boxed(text), DEBATABLE.get(kind, 0))
    if after_hashes:
        yield from _hash_lines(gold)


def _boxed(text: str) -> str:
    return f"{THOUGHT}So the answer is $\\boxed{{{text}}}$."


def _places(gold: str, after_hashes: bool) -> Iterator[tuple[str, str]]:
    box = f"\\boxed{{{gold}}}"
    yield "box without $", f"{THOUGHT}So {box}."
    yield "display box", f"{THOUGHT}\\[\n\\boxed{{ {gold} }}\n\\]"
    yield "heading before the box", f"{THOUGHT}#### Final Answer\n${box}$"
    yield "headings of steps", f"{THOUGHT}#### Step 1: Add 3\nWe do.\n\n#### Step 2: Divide by 5\nThus ${box}$."
    yield "number after the box", f"{THOUGHT}Hence ${box}$. This took 3 steps and $7$ lines."
    yield "corrected box", f"\\boxed{{1000001}}. Wait, I made a mistake. {box}"
    yield "box twice", f"{THOUGHT}It is {box}.\n\n**Final Answer**\n\n{box}"
    yield "final statement", f"{THOUGHT}The answer is ${gold}$."
    yield "final statement", f"{THOUGHT}**Answer:** ${gold}$"
    yield "final statement", f"{THOUGHT}Therefore, the final answer is:\n\n$${gold}$$"
    yield "final statement", f"{THOUGHT}The final answer is \\({gold}\\). I hope it is correct."
    if re.fullmatch(r"[-\d.,]+", gold):
        yield "plain statement", f"{THOUGHT}The answer is {gold}."
        yield "plain statement", f"{THOUGHT}The answer is **{gold}**."
        yield "plain statement", f"{THOUGHT}So in the end there are {gold} of them."
    if after_hashes:
        yield "box beside ####", f"{THOUGHT}#### 1000001\nNo: ${box}$"


def _other_places(gold: str, after_hashes: bool) -> Iterator[tuple[str, str]]:
    yield "other box", f"First, $x = {gold}$. Adding gives $\\boxed{{1000001}}$."
    yield "other box", f"The answer is ${gold}$, that is, $\\boxed{{1000001.}}$."
    yield "unreadable box", f"First, $x = {gold}$. Adding gives $\\boxed{{?}}$."
    yield "empty box", f"The answer is ${gold}$, so $\\boxed{{}}$."
    yield "corrected box, old value", f"\\boxed{{{gold}}}. Wait, I made a mistake. \\boxed{{1000001}}"
    yield "two values in a box", f"{THOUGHT}$\\boxed{{{gold} \\text{{ or }} 1000001}}$"
    yield "two boxes, one answer", f"{THOUGHT}$\\boxed{{{gold}}}$ or $\\boxed{{1000001}}$"
    yield "box that is cut", f"{THOUGHT}So the answer is $\\boxed{{{gold}"
    yield "heading alone", f"{THOUGHT}#### Step {gold}: go on\nSo $\\boxed{{1000001}}$."
    yield "nothing", "I do not know."
    yield "other statement", f"We have ${gold}$ at first. The answer is $1000001$."
    if after_hashes:
        yield "other line after ####", f"{gold} + 1 = 1000001.\n#### 1000001"


def _hash_lines(gold: str) -> Iterator[Case]:
    for kind, line in [
        ("line after ####", gold),
        ("line after ####, bold", f"**{gold}**"),
        ("line after ####, dollars", f"${gold}"),
        ("line after ####, unit", f"{gold} clips"),
        ("line after ####, heading", f"Answer\n{gold}"),
        ("line after ####, full stop", f"{gold}."),
        ("line after ####, more text", f"{gold}\nI hope this helps!"),
        ("line after ####, statement", f"The answer is {gold}"),
    ]:
        yield Case(kind, f"{THOUGHT}#### {line}", 1)
    for kind, line in [
        ("scale after ####", f"{gold} million"),
        ("scale after ####", f"{gold}k"),
        ("percent after ####", f"{gold}%"),
        ("negation after ####", f"not {gold}"),
        ("time after ####", f"{gold}:30"),
        ("range after ####", f"{gold}-{gold}1"),
        ("two after ####", f"{gold} or 1000001"),
        ("half after ####", f"{gold} and a half"),
        ("fraction after ####", f"{gold} 1/2"),
    ]:
        yield Case(kind, f"{THOUGHT}#### {line}", 0)
    yield Case("negation", f"{THOUGHT}The answer is {gold} but that is wrong, it is 1000001.", 0)
    yield Case("negation", f"{THOUGHT}The answer is not {gold}.", 0)
