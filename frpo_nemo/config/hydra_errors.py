"""Turn errors of Hydra, OmegaConf and the YAML parser into one sentence that gives what to write."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import yaml
from hydra.errors import MissingConfigException, OverrideParseException

from frpo_nemo.config.load import one_line
from frpo_nemo.config.overrides import CONFIGS

# (pattern of their message, the sentence that replaces it, with the match's groups)
_SENTENCES = [
    (
        r"Could not override '(\w+)'\.\s+To append to your config use \+\1=(\{.*\})",
        r"\1=\2: \1 takes the name of a file in configs/\1; for only these options write "
        r"'~\1' '+\1=\2', and '+\1=\2' to add them to those of the configuration",
    ),
    (
        r"Could not override '(\w+)'\.\s+No match in the defaults list\.\s+To append to your default list use \+\1=(.*)$",
        r"\1=\2: this configuration has no group \1 from which to choose a file",
    ),
    (
        r"Multiple values for (\w+)\. .*",
        r"\1 has a choice in this configuration already; write \1=NAME to take another one",
    ),
    (
        r"Error merging override (\+*([\w.]+)\.(\d+)[.=].*): list index out of range",
        r"\1: \2 has no entry \3 (the first is 0); to have more entries write the whole list, \2=[{...}, {...}]",
    ),
    (
        r"Error merging override \+*([\w.]+)=(.*): Cannot merge a mapping with a list",
        r"\1=\2 must be a list; write \1=[\2]",
    ),
    (r"Sweep parameters '([^']*)' requires --multirun", r"\1: one run takes one value; start one command per value"),
    (r"(Ambiguous .*?)\s1\. .*", r"\1; write a list as key=[a,b] and text as key='a,b'"),
]


def sentence(error: Exception, config_name: str, config_dir: str | None) -> str:
    """Return `error`, which composing `config_name` raised, as a sentence for the user."""
    if isinstance(error, MissingConfigException):
        return _missing_file(error, config_name, config_dir)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    text = ": ".join(one_line(str(e)) for e in (error, error.__cause__) if e)
    if isinstance(error, yaml.YAMLError):
        return f"Not valid YAML: {text}."
    if isinstance(error, TypeError):
        return f"{text}; the entries of a list are numbered from 0, as in data.train.0.limit=3."
    for theirs, plain in (("++", ""), ("DictConfig", "a mapping"), ("ListConfig", "a list")):
        text = text.replace(theirs, plain)
    for pattern, ours in _SENTENCES:
        if found := re.match(pattern, text, re.DOTALL):
            return found.expand(ours) + "."
    return text + "."


def _missing_file(error: MissingConfigException, config_name: str, config_dir: str | None) -> str:
    if error.missing_cfg_file == config_name:
        directories = [Path(directory) for directory in (config_dir, CONFIGS) if directory]
        names = [str(file.relative_to(d).with_suffix("")) for d in directories for file in sorted(d.rglob("*.yaml"))]
        near = difflib.get_close_matches(config_name, names, n=1) or [n for n in names if n.endswith(f"/{config_name}")]
        hint = f"the nearest is {near[0]}" if near else f"there are only {', '.join(names)}"
        return f"There is no configuration {config_name} in {' or '.join(map(str, directories))}; {hint}."
    group, _, choice = str(error.missing_cfg_file).rpartition("/")
    beside, _, plain = group.rpartition("/")
    if beside and (CONFIGS / plain).is_dir():  # +probe=safety on experiment/x: Hydra looks in that file's folder
        return f"+{plain}={choice}: the configuration has a choice of {plain} already; write {plain}={choice}."
    choices = f"; the choices of {group} are {', '.join(error.options)}" if error.options else ""
    return f"{group}={choice}: there is no configuration {error.missing_cfg_file}{choices}."


def _unreadable(override: str) -> str:
    key, _, value = override.lstrip("+").partition("=")
    numbered = re.sub(r"\[(\d+)\]", r".\1", key)
    if numbered != key:
        return f"{key} is written {numbered}={value}."
    if re.search(r"\.-\d", key):
        return f"{key}={value}: the entries of a list are numbered from 0, as in data.train.0.limit=3."
    if value.startswith("[") and "{" not in value:
        texts = ",".join("'" + text.strip("'\"") + "'" for text in value.strip("[]").split(","))
        return f'Cannot read the override {key}={value}; quote each text in the list: "{key}=[{texts}]".'
    if re.match(r"\[?\{\s*['\"]?[\w.-]+['\"]?\s*:", value):
        return (
            f"Cannot read the override {key}={value}; quote values with special characters and no keys, as in "
            f"\"{key}={{key: 'a|b'}}\", or write it into a YAML file."
        )
    return f"Cannot read the override {key}={value}; quote values with special characters: \"{key}='{value}'\"."
