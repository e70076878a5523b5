"""A user's rewards, for test_partly_scored.py: a response is JSON that says what each reward gives it."""

import json


def part(completions, of, **columns):
    """`of`: which. null is no opinion, "fail" an exception."""
    return [_part(json.loads(completion)[of]) for completion in completions]


def _part(value):
    if value == "fail":
        raise ValueError("no such luck")
    return value


def characters(prompts, completions, **columns) -> list[float]:
    return [float(len(text)) for text in completions]
