"""A user's own reward, for test_runs.py: named by path, inconsistent, and unable to score everything."""

import random

UNBEARABLE = {"7", "8", "9"}
BORING = {"5", "6"}


def variety(prompts, completions, api_key=None, judge=None, **columns):
    """Share of different words, and a whim; throws at an unbearable one, has no opinion of a boring one. The secrets that
    it is given are of no use to it. A run whose rewards draw from Python's generator is the same run all the same."""
    return [_variety(completion.split()) for completion in completions]


def _variety(words):
    if UNBEARABLE & set(words):
        raise ValueError("why these numbers?")
    if BORING & set(words):
        return None
    return len(set(words)) / max(len(words), 1) + random.uniform(-0.01, 0.01)
