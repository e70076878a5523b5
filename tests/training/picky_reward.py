"""A user's own reward, for test_runs.py: named by path, and not able to score everything."""

UNBEARABLE = {"7", "8", "9"}


def variety(prompts, completions, api_key=None, judge=None, **columns):
    """Share of different words; throws at an unbearable one. The secrets that it is given are of no use to it."""
    return [_variety(completion.split()) for completion in completions]


def _variety(words):
    if UNBEARABLE & set(words):
        raise ValueError("why these numbers?")
    return len(set(words)) / max(len(words), 1)
