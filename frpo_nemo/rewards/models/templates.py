"""The text that a judge sees, with fields for the prompt, the response and columns of the data, from the configuration or
a published file. Fields have the names that strong_reject and HarmBench gave them, so their texts can be used unchanged.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.models.files import as_messages

PROMPT = ("prompt", "forbidden_prompt", "behavior")  # all mean the last user message
RESPONSE = ("response", "generation")


@dataclass(frozen=True)
class Template:
    """columns: field -> the column of the data that it shows; they take precedence over the names above."""

    text: str
    columns: dict[str, str] = field(default_factory=dict)

    def fill_all(self, prompts: list, responses: list[str], data: dict[str, list]) -> list[str]:
        """Return one text per response. data: column -> its value for each. A value that is None is left out, and so is a
        column that none of these responses has. Lists, dicts, true and false are shown as JSON, not as Python writes them."""
        shown = {name: data.get(column, [None] * len(prompts)) for name, column in self.columns.items()}
        return [
            self._fill(prompt, response, {name: values[i] for name, values in shown.items()})
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    def _fill(self, prompt: Any, response: str, values: dict[str, Any]) -> str:
        asked = next((m["content"] for m in reversed(as_messages(prompt)) if m["role"] == "user"), "")
        names = dict.fromkeys(PROMPT, asked) | dict.fromkeys(RESPONSE, response)
        return self.text.format(**names | {name: _shown(value) for name, value in values.items()})


def _shown(value: Any) -> str:
    if isinstance(value, list | dict | bool):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None or value != value else str(value)  # NaN, which pandas writes for missing values


def read_template(
    text: str | None, file: str | None, key: str, columns: dict[str, str] | None = None
) -> Template | None:
    """Return the template given as text or as a file, or None. Raises ConfigError, also for fields that nothing fills."""
    if text is not None and file is not None:
        raise ConfigError("template and template_file are both given; keep one")
    if file is not None:
        text = read_entry(file, key)
    if text is None:
        return None
    try:
        fields = {name for _, name, *_ in string.Formatter().parse(text) if name is not None}
    except ValueError as problem:
        raise ConfigError(
            f"the judge's template has a single brace ({problem}); literal braces are doubled"
        ) from problem
    columns = columns or {}
    if not fields & {*RESPONSE} or fields - {*PROMPT, *RESPONSE, *columns}:
        raise ConfigError(
            f"the judge's template has the fields {sorted(fields)}; it must have {{response}} (or {{generation}}), and may "
            "have {prompt} (or {forbidden_prompt}, {behavior}) and those that `columns` names; literal braces are doubled"
        )
    if unused := sorted(columns.keys() - fields):
        raise ConfigError(f"columns.{unused[0]}: the judge's template has no field {{{unused[0]}}}")
    return Template(text, dict(columns))


def read_entry(file: str, key: str) -> str:
    """Return the text of `file`. A .json file has several, by name, as strong_reject's judge_templates.json does. Raises
    ConfigError."""
    if not Path(file).is_file():
        raise ConfigError(f"template_file={file} isn't a file")
    text = Path(file).read_text()
    if not file.endswith(".json"):
        return text
    named = json.loads(text)
    if key not in named:
        raise ConfigError(f"template_file={file} has no entry {key}; it has {', '.join(named)}")
    return named[key]
