"""The recipe check's reward: a random model never answers correctly, but its responses differ in this."""


def variety(prompts: list, completions: list[str], **columns) -> list[float]:
    """Return the share of different words in each completion."""
    words = [completion.split() for completion in completions]
    return [len(set(each)) / max(len(each), 1) for each in words]
