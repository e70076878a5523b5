"""A judge's answers that count, and their values, as the configuration gives them."""

from __future__ import annotations

import math
from typing import Any

from frpo_nemo.errors import ConfigError

WORDS = {True: "yes, on or true", False: "no, off or false", None: "null, ~ or nothing"}  # what YAML reads as each


def read_choices(choices: dict[Any, Any]) -> dict[str, float]:
    """Return answer -> value, in the order given. Raises ConfigError for an answer that is neither text nor a whole number,
    which YAML made of an unquoted word, and for a value that isn't a finite number."""
    for answer, value in choices.items():
        if isinstance(answer, bool) or answer is None:
            raise ConfigError(
                f"choices: an answer is {answer}, which is how YAML reads {WORDS[answer]} without quotes; write it in "
                f'quotes, such as {{"yes": 1.0, "no": 0.0}}'
            )
        if not isinstance(answer, (str, int)):
            raise ConfigError(f"choices: the answer {answer!r} isn't text; write it in quotes, as the judge writes it")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"choices: the value of {str(answer)!r} is {value!r}; it must be a finite number")
    found = {str(answer): float(value) for answer, value in choices.items()}
    if len(found) < len(choices):
        raise ConfigError(
            f"choices: an answer is given twice, as a number and as text: {', '.join(map(repr, choices))}"
        )
    return found
