"""Secrets out of what is written: configurations, commands, messages. What counts as one: the value of an option or
environment variable whose name says so (api_key, HF_TOKEN, password), and the user part of a URL. Imports nothing of ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

HIDDEN = "REDACTED"  # a command with it can still be parsed

_LAST_WORDS = {"apikey", "auth", "authorization", "cookie", "credential", "credentials", "jwt", "passphrase", "passwd"}
_LAST_WORDS |= {"password", "secret", "secrets", "token"}
_KEYS = {"access", "api", "auth", "private", "secret"}  # such a key is a secret; another key may be a column
_OF_TEXT = {"bos", "cls", "end", "eos", "first", "last", "mask", "next", "pad", "per", "sep", "special", "start"}
_OF_TEXT |= {"stop", "unk"}  # such a token is not a secret
_SHORTEST = 6  # a shorter value is no secret to look for in texts: it would be found inside other words
_USER_OF_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_\w{16,}|\bsk-[\w-]{16,}|\bgh[pousr]_\w{20,}|\bAKIA\w{16}|\beyJ[\w-]+\.[\w-]+\.[\w-]*")
_SIGNATURE = re.compile(r"([?&][^=&\s]*(?:token|key|signature|secret)=)[^&\s'\"]+", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"(?P<name>[\w.-]*(?:" + "|".join(sorted({*_LAST_WORDS, "key"}, reverse=True)) + r"))(?P<between>['\"]?\s*[=:]\s*)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|(?:(?:bearer|basic)\s+)?[^\s,;&}\])'\"]+)",
    re.IGNORECASE,
)

_known: set[str] = set()  # values that `remember` has met


def is_secret(name: str) -> bool:
    """Whether an option of this name (reward.judge.args.api_key, X-Api-Key, HF_TOKEN) holds a secret. max_tokens does
    not, nor does eos_token."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2]).lower())
    *_, before, last = ["", "", *words]
    if last == "key":
        return before in _KEYS
    return last in _LAST_WORDS and not (last == "token" and before in _OF_TEXT)


def remember(values: Any) -> None:
    """From now on `text` hides the secrets among nested `values`, wherever they stand."""
    _known.update(secret for secret in map(str, _secrets(values)) if len(secret) >= _SHORTEST)


def values(nested: Any, hide: bool = False) -> Any:
    """`nested` dicts and lists with their secrets hidden; null, true and false stay what they are."""
    if isinstance(nested, dict):
        return {name: values(item, hide or is_secret(str(name))) for name, item in nested.items()}
    if isinstance(nested, (list, tuple)):
        return [values(item, hide) for item in nested]
    if nested is None or isinstance(nested, bool):
        return nested
    if hide:
        return HIDDEN
    return text(nested, assignments=False) if isinstance(nested, str) else nested


def arguments(command: Sequence[str]) -> list[str]:
    """A command line, with the secrets in its overrides hidden."""
    return [_argument(str(argument)) for argument in command]


def text(message: str, *, assignments: bool = True) -> str:
    """`message` without the secrets of the environment, those remembered, what looks like a well-known service's token,
    and those in URLs; and, with `assignments`, without the values in what reads like api_key=... or 'token': '...'."""
    environment = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    for secret in sorted(_known | environment, key=len, reverse=True):
        message = message.replace(secret, HIDDEN)
    message = _SIGNATURE.sub(rf"\g<1>{HIDDEN}", _USER_OF_URL.sub(rf"\g<1>{HIDDEN}@", message))
    message = _TOKEN.sub(HIDDEN, message)
    return _ASSIGNMENT.sub(_without_value, message) if assignments else message


def _argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and is_secret(name) and not _is_harmless(value):
        return f"{name}={HIDDEN}"
    return text(argument)


def _without_value(found: re.Match) -> str:
    if _is_harmless(found["value"]):
        return found[0]
    if not is_secret(found["name"]):
        return f"{found['name']}{found['between']}{_ASSIGNMENT.sub(_without_value, found['value'])}"
    return f"{found['name']}{found['between']}{HIDDEN}"


def _is_harmless(value: str) -> bool:
    return value.startswith(("${", HIDDEN)) or value.strip("'\"").lower() in ("", "null", "none", "true", "false")


def _secrets(nested: Any, secret: bool = False):
    if isinstance(nested, dict):
        for name, item in nested.items():
            yield from _secrets(item, secret or is_secret(str(name)))
    elif isinstance(nested, (list, tuple)):
        for item in nested:
            yield from _secrets(item, secret)
    elif secret and nested is not None and not isinstance(nested, bool):
        yield nested
