"""The client of model servers: vLLM's own, or any that speaks OpenAI's protocol over HTTP. A server that is away is
waited for, and found again where its URL file then points; a request that stays unanswered is a `Failure` of its own.
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

AWAY = {429, 502, 503, 504}  # too busy, or a proxy before a server that starts
NO_LIMITS = httpx.Limits(max_connections=None)  # `concurrency` is the limit
LONGEST_PAUSE = 5.0  # seconds; a server that is back is seen within them
TIMEOUT, PATIENCE = 60.0, 420.0  # three servers that stay away are given up within the default trainer.phase_timeout
UNREADABLE = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)  # raised by answers of another form
NOT_REACHED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL, OSError)  # the last two by the URL file


@dataclass(frozen=True)
class Trouble:
    """An attempt that may be repeated. taken: the server may have begun with the request, so that it is perhaps the
    request that breaks it."""

    failure: Failure
    taken: bool


class RemoteServer:
    """`post_all` sends requests, `concurrency` at a time."""

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
        files) and may be absent while the server starts. served_model_name: what requests call the model; None: `model`.
        api_key_env: the environment variable with the key. timeout: seconds for one answer. patience: seconds without an
        answer to anyone, after which all that is left fails unasked. retries: how often a request is repeated that the
        server took and did not answer. Raises ConfigError; connects to nothing."""
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
        self._trouble: Failure | None = None  # anyone's last
        self._random = random.Random()  # not the run's generator, which a checkpoint restores
        self._client().close()  # finds a proxy that cannot be used

    def post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
        """The JSON of each answer to POST url/path, or a Failure (error: the server refused it; timeout; died: it went
        away and did not come back within the patience)."""
        if not bodies:
            return []
        self._last_answer, self._trouble = time.monotonic(), None
        with (
            self._client() as client,
            ThreadPoolExecutor(self._concurrency) as threads,
        ):
            return list(threads.map(lambda body: self._post(client, path, body), bodies))

    def _client(self) -> httpx.Client:
        """A server of this cluster is asked directly, others through the proxy of the environment, if it names one."""
        direct = self._url_file or is_near(httpx.URL(self._url).host)
        transport = httpx.HTTPTransport(limits=NO_LIMITS) if direct else None
        try:
            return httpx.Client(timeout=self._timeout, headers=self._headers, limits=NO_LIMITS, transport=transport)
        except (ImportError, ValueError) as problem:
            raise ConfigError(
                f"remote.url={self._url}: the proxy of the environment cannot be used: {problem}"
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
        """If the patience is over, or will be after `pause` seconds. Nobody is given up before somebody had trouble."""
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
        """Seconds until the next attempts: doubling, and spread, since all requests find the server away together."""
        pause = 0.5
        while True:
            yield pause * self._random.uniform(0.5, 1.0)
            pause = min(2 * pause, LONGEST_PAUSE)


def quote(answer: Any, longest: int = 200) -> str:
    """The beginning of what a server said, for a message. A secret is hidden before the cut, which would leave a part of it
    that nobody recognises."""
    return redact.text(str(answer))[:longest]


def finite(value: Any) -> float:
    """A number in an answer. Raises ValueError or OverflowError if it is something else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def longest_wait(remote: dict[str, Any]) -> float:
    """Seconds for which a call waits for a server that stays away, by the arguments of its RemoteServer: a last request
    may begin when the patience ends."""
    return remote.get("patience", PATIENCE) + remote.get("timeout", TIMEOUT)


@functools.lru_cache
def is_near(host: str) -> bool:
    """Whether a host is this machine or in this network: its name has no domain, or means private addresses alone. A web
    proxy knows no way there."""
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
        return Failure("error", f"{response.url} answered no JSON: {quote(response.text, 300)}")


def _checked(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as problem:
        raise ConfigError(f"remote.url={url} is no URL: {problem}") from problem
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            f"remote.url={url} is neither http://host:port nor a file that slurm/serve.sh writes, such as judge.url"
        )
    if parsed.userinfo:
        raise ConfigError("remote.url must not contain a user or password: give the key by remote.api_key_env")
    return _without_version(url)


def _without_version(url: str) -> str:
    # OpenAI's paths begin with /v1, which its clients take as a part of the URL; vLLM's own paths do not.
    return url.rstrip("/").removesuffix("/v1")


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(f"remote.api_key_env={variable}: no such environment variable is set")
    redact.remember({"api_key": key})  # servers quote it
    return {"Authorization": f"Bearer {key}"}
