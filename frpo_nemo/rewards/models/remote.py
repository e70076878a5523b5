"""The client of model servers: vLLM's own, or any that speaks OpenAI's protocol over HTTP. It waits for a server that is
away, and follows its URL file to where it returns; a request that stays unanswered is a `Failure` of that request alone.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import math
import os
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.registry import Failure

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request otherwise

AWAY = {429, 502, 503, 504}  # too busy, or a proxy in front of a server that is starting
NO_LIMITS = httpx.Limits(max_connections=None)  # `concurrency` is the limit
LONGEST_PAUSE = 5.0  # seconds; a server that is back is noticed within this time
TIMEOUT, PATIENCE = 60.0, 420.0  # three servers that stay away are given up within the default trainer.phase_timeout
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)  # raised by answers of another form
NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL, OSError)  # the last two from the URL file


@dataclass(frozen=True)
class Trouble:
    """An attempt that may be repeated. taken: the server may have started on the request, so the request itself may be
    what breaks it."""

    failure: Failure
    taken: bool


class RemoteServer:
    """A server to which `post_all` sends requests, `concurrency` at a time."""

    def __init__(
        self,
        model: str,
        url: str,
        *,
        served_model_name: str | None = None,
        api_key_env: str | None = None,
        timeout: float = TIMEOUT,
        patience: float = PATIENCE,
        retries: int = 4,
        concurrency: int = 16,
    ) -> None:
        """url: http(s)://host[:port], with or without /v1, or a file NAME.url that holds it (slurm/serve.sh writes such
        files) and may be absent while the server starts. served_model_name: the model's name in requests; None: `model`.
        api_key_env: the environment variable with the key. timeout: seconds for one answer. patience: seconds without any
        answer after which all remaining requests fail unsent. retries: how often a request is repeated that the server
        accepted and did not answer. Connects to nothing. Raises ConfigError."""
        if timeout <= 0 or patience < 0 or retries < 0 or concurrency < 1:
            raise ConfigError(
                f"remote: timeout={timeout} must be above 0, patience={patience} and retries={retries} at least 0, and "
                f"concurrency={concurrency} at least 1"
            )
        self.served_model_name = served_model_name or model
        self._url_file = Path(url).absolute() if "://" not in url and url.endswith(".url") else None
        self._url = None if self._url_file else _checked(url)
        self._headers = _authorization(api_key_env)
        self._timeout, self._patience, self._retries = timeout, patience, retries
        self._concurrency = concurrency
        self._last_answer = 0.0
        self._trouble: Failure | None = None  # the last one of any request
        self._random = random.Random()  # not the run's generator, which a checkpoint restores
        self._client().close()  # raises for a proxy that cannot be used

    def post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
        """Return the JSON of each answer to POST url/path, or a Failure (error: the server refused it; timeout; died: it
        went away and did not come back within the patience)."""
        if not bodies:
            return []
        self._last_answer, self._trouble = time.monotonic(), None
        with (
            self._client() as client,
            ThreadPoolExecutor(self._concurrency) as threads,
        ):
            return list(threads.map(lambda body: self._post(client, path, body), bodies))

    def _client(self) -> httpx.Client:
        """Return a client that reaches servers of this cluster directly, others through the environment's proxy, if any."""
        direct = self._url_file or is_near(httpx.URL(self._url).host)
        transport = httpx.HTTPTransport(limits=NO_LIMITS) if direct else None
        try:
            return httpx.Client(timeout=self._timeout, headers=self._headers, limits=NO_LIMITS, transport=transport)
        except (ImportError, ValueError) as problem:
            raise ConfigError(
                f"remote.url={self._url}: the proxy set in the environment cannot be used: {problem}"
            ) from problem

    def _post(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        taken = 0
        for pause in self._pauses():
            if given_up := self._given_up(0.0):  # while this request waited for its turn
                return given_up
            answer = self._attempt(client, path, body)
            if not isinstance(answer, Trouble):
                return answer
            self._trouble = answer.failure
            taken += answer.taken
            if taken > self._retries:
                return answer.failure
            if given_up := self._given_up(pause):
                return given_up
            time.sleep(pause)

    def _given_up(self, pause: float) -> Failure | None:
        """Return a Failure if the patience is over, or will be after `pause` seconds, and a request has had trouble."""
        if self._trouble is None or time.monotonic() + pause <= self._last_answer + self._patience:
            return None
        message = f"the server gave no answer within patience={self._patience:g} s: {self._trouble.message}"
        return Failure("died", message)

    def _attempt(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        try:
            response = client.post(self._address() + path, json=body)
        except NOT_REACHED as problem:
            return Trouble(Failure("died", str(problem)), taken=False)
        except httpx.TimeoutException:
            return Trouble(Failure("timeout", f"no answer within timeout={self._timeout:g} s"), taken=True)
        except httpx.TransportError as problem:
            return Trouble(Failure("died", f"{type(problem).__name__}: {problem}"), taken=True)
        except (httpx.HTTPError, ValueError) as problem:  # a body or an answer that cannot be coded
            return Failure("error", f"{type(problem).__name__}: {problem}")
        away = response.status_code in AWAY
        if away or response.is_server_error:
            return Trouble(_refusal(response), taken=not away)
        self._last_answer = time.monotonic()
        return _json(response) if response.is_success else _refusal(response)

    def _address(self) -> str:
        return self._url or _without_version(self._url_file.read_text().strip())

    def _pauses(self) -> Iterator[float]:
        """Yield the seconds until each next attempt: doubling, and spread, since all requests lose the server together."""
        pause = 0.5
        while True:
            yield pause * self._random.uniform(0.5, 1.0)
            pause = min(2 * pause, LONGEST_PAUSE)


def quote(answer: Any, longest: int = 200) -> str:
    """Quote the beginning of a server's answer in a message. Secrets are hidden before the cut, which could otherwise leave
    an unrecognisable part of one."""
    return redact.text(str(answer))[:longest]


def finite(value: Any) -> float:
    """Return a number of an answer. Raises ValueError or OverflowError if it isn't a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} isn't a finite number")
    return float(value)


def longest_wait(remote: dict[str, Any]) -> float:
    """Return the seconds for which a call waits for a server that stays away, from the arguments of its RemoteServer: a
    last request may begin when the patience ends."""
    return remote.get("patience", PATIENCE) + remote.get("timeout", TIMEOUT)


@functools.lru_cache
def is_near(host: str) -> bool:
    """Return whether a host is this machine or in this network, which a web proxy cannot reach: its name has no domain, or
    means only private addresses."""
    if "." not in host and ":" not in host:
        return True
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:  # no such name here: the proxy may know it
        return False
    return not any(ipaddress.ip_address(address).is_global for address in found)


def _refusal(response: httpx.Response) -> Failure:
    return Failure("error", f"{response.url} answered {response.status_code}: {quote(response.text, 300)}")


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        return Failure("error", f"the answer of {response.url} isn't JSON: {quote(response.text, 300)}")


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as problem:
        raise ConfigError(f"remote.url={url} isn't a URL: {problem}") from problem
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"remote.url={url} must be http://host:port or a file that slurm/serve.sh writes, such as judge.url"
        )
    if parsed.userinfo:
        raise ConfigError("remote.url must not contain a user or password: give the key with remote.api_key_env")
    return _without_version(url)


def _without_version(url: str) -> str:
    # OpenAI's paths begin with /v1, which its clients treat as part of the URL; vLLM's own paths do not.
    return url.rstrip("/").removesuffix("/v1")


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"remote.api_key_env={variable}: this environment variable is not set")
    redact.remember({"api_key": key})  # servers quote it
    return {"Authorization": f"Bearer {key}"}
