"""Remove secrets from all that is written: configurations, commands, messages. A secret is the value of an option or
environment variable with a telling name (api_key, HF_TOKEN, password), or the user part of a URL. Imports nothing of ours.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from typing import Any

HIDDEN = "REDACTED"  # a word that needs no quotes in a command

_LAST_WORDS = {"apikey", "auth", "authorization", "cookie", "credential", "jwt", "pass", "passphrase", "passwd"}
_LAST_WORDS |= {"password", "pwd", "secret", "token"}
_KEYS = {"access", "account", "api", "auth", "encryption", "openai", "private", "secret", "signing", "ssh"}
# A key after one of _KEYS is a secret; another key may be a column. Several tokens after one of _TOKENS are secrets; others
# are an amount of text. After the words in _PASSES, "pass" isn't a password.
_TOKENS = _KEYS | {"bearer", "hf", "refresh", "session"}
_PASSES = {"", "backward", "first", "forward", "last", "max", "multi", "num", "per", "second", "single"}
_OF_TEXT = {"bos", "cls", "end", "eos", "first", "last", "mask", "next", "pad", "per", "sep", "special", "start"}
_OF_TEXT |= {"stop", "unk"}  # a token after one of these isn't a secret
_SHORTEST = 6  # shorter values aren't looked for in texts: they would be found inside other words
_USER_OF_URL = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@'\"]+@", re.IGNORECASE)
_TOKEN = re.compile(
    r"\bhf_\w{16,}|\b(?:sk|nvapi|glpat)-[\w-]{16,}|\bgh[pousr]_\w{20,}|\bgithub_pat_\w{20,}|\bA[KS]IA\w{16}"
    r"|\beyJ[\w-]+\.[\w-]+\.[\w-]*"
)
_QUERY = re.compile(r"(?P<name>[?&][^=&\s'\"]*)=(?P<value>[^&\s'\"]+)")
_SIGNATURES = ("key", "secret", "sig", "signature", "token")  # ends of names in a query
_ASSIGNMENT = re.compile(
    r"(?P<name>[\w.-]*(?:" + "|".join(sorted({*_LAST_WORDS, "key"}, reverse=True)) + r")s?[_-]?\d*)"
    r"(?P<between>['\"]?\s*[=:]\s*)"
    r"(?P<value>'[^']*'|\"[^\"]*\"|\[[^\]]*\]|(?:(?:bearer|basic)\s+)?[^\s,;&}\])'\"]+)",
    re.IGNORECASE,
)
_ANSI_QUOTED = r"\$'((?:[^'\\]|\\.)*)'"  # bash's quoting, which shlex does not support
_SHELL_WORD = re.compile(rf"""(?:{_ANSI_QUOTED}|[^\s'"\\;&|]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""", re.DOTALL)

_known: set[str] = set()  # values that `remember` was given


def is_secret(name: str) -> bool:
    """Return whether an option of this name (reward.judge.args.api_key, X-Api-Key, HF_TOKEN) holds a secret. max_tokens
    does not, nor does eos_token."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rpartition(".")[2]).lower())
    *_, before, last = ["", "", *(bare for word in words if (bare := word.rstrip("0123456789")))]
    if last == "tokens":
        return before in _TOKENS
    last = last if last in _LAST_WORDS else last.removesuffix("s")
    if last == "key":
        return before in _KEYS
    if last in ("pass", "pwd"):
        return before not in _PASSES
    return last in _LAST_WORDS and not (last == "token" and before in _OF_TEXT)


def remember(values: Any) -> None:
    """Make `text` hide the secrets among nested `values` from now on, wherever they appear."""
    _known.update(secret for secret in map(str, _secrets(values)) if len(secret) >= _SHORTEST)


def values(nested: Any, hide: bool = False) -> Any:
    """Return `nested` dicts and lists with their secrets hidden; null, true and false stay as they are."""
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
    """Return a command line with the secrets in its overrides hidden."""
    return [_argument(str(argument)) for argument in command]


def shell_line(line: str) -> str:
    """Return a line for a shell with the secrets in its words hidden, however they are quoted; the rest is unchanged."""
    return _SHELL_WORD.sub(_shell_word, line)


def text(message: str, *, assignments: bool = True) -> str:
    """Return `message` without the secrets of the environment, those remembered, tokens in the form of a well-known
    service, and secrets in URLs. With `assignments`, also hide the values in texts like api_key=... or 'token': '...'."""
    environment = {value for name, value in os.environ.items() if is_secret(name) and len(value) >= _SHORTEST}
    for secret in sorted(_known | environment, key=len, reverse=True):
        message = message.replace(secret, HIDDEN)
    message = _QUERY.sub(_without_signature, _USER_OF_URL.sub(rf"\g<1>{HIDDEN}@", message))
    message = _TOKEN.sub(HIDDEN, message)
    return _ASSIGNMENT.sub(_without_value, message) if assignments else message


def _argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and is_secret(name) and not _is_harmless(value):
        return f"{name}={HIDDEN}"
    return text(argument)


def _shell_word(found: re.Match) -> str:
    word = "".join(shlex.split(re.sub(_ANSI_QUOTED, lambda quoted: shlex.quote(quoted[1]), found[0])))
    hidden = _argument(word)
    return found[0] if hidden == word else shlex.quote(hidden)


def _without_signature(found: re.Match) -> str:
    is_signature = found["name"].lower().endswith(_SIGNATURES) or is_secret(found["name"])
    return f"{found['name']}={HIDDEN}" if is_signature else found[0]


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
