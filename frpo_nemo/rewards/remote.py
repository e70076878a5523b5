"""The client of model servers: vLLM's own, or any that speaks OpenAI's protocol over HTTP. A server that is away is
waited for, and found again where its URL file then points; a request that stays unanswered is a `Failure` of its own.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.call import Failure

logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per request otherwise

AWAY = {429, 502, 503, 504}  # too busy, or a proxy before a server that starts
NO_LIMITS = httpx.Limits(max_connections=None)  # `concurrency` is the limit
LONGEST_PAUSE = 5.0  # seconds; a server that is back is seen within them


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
        timeout: float = 60.0,
        patience: float = 600.0,
        retries: int = 4,
        concurrency: int = 16,
    ) -> None:
        """url: http(s)://host[:port], with or without /v1, or a file NAME.url that holds it (slurm/serve.sh writes such
        files) and may be absent while the server starts. served_model_name: what requests call the model; None: `model`.
        api_key_env: the environment variable with the key. timeout: seconds for one answer. patience: seconds without an
        answer to anyone, after which all that is left fails. retries: how often a request is repeated that the server took
        and did not answer. Raises ConfigError; connects to nothing."""
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
        self._random = random.Random()  # not the run's generator, which a checkpoint restores

    def post_all(self, path: str, bodies: list[dict[str, Any]]) -> list[Any]:
        """The JSON of each answer to POST url/path, or a Failure (error: the server refused it; timeout; died: it went
        away and did not come back within the patience)."""
        if not bodies:
            return []
        self._last_answer = time.monotonic()
        with (
            httpx.Client(timeout=self._timeout, headers=self._headers, limits=NO_LIMITS) as client,
            ThreadPoolExecutor(self._concurrency) as threads,
        ):
            return list(threads.map(lambda body: self._post(client, path, body), bodies))

    def _post(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        taken = 0
        for pause in self._pauses():
            answer = self._attempt(client, path, body)
            if not isinstance(answer, Trouble):
                return answer
            taken += answer.taken
            if taken > self._retries:
                return answer.failure
            if time.monotonic() + pause > self._last_answer + self._patience:
                message = f"the server gave no answer within patience={self._patience:g} s: {answer.failure.message}"
                return Failure("died", message)
            time.sleep(pause)

    def _attempt(self, client: httpx.Client, path: str, body: dict[str, Any]) -> Any:
        try:
            response = client.post(self._address() + path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout, OSError) as problem:  # OSError: the URL file
            return Trouble(Failure("died", str(problem)), taken=False)
        except httpx.TimeoutException:
            return Trouble(Failure("timeout", f"no answer within timeout={self._timeout:g} s"), taken=True)
        except httpx.TransportError as problem:
            return Trouble(Failure("died", f"{type(problem).__name__}: {problem}"), taken=True)
        if response.is_success:
            self._last_answer = time.monotonic()
            return _json(response)
        failure = Failure("error", f"{response.url} answered {response.status_code}: {response.text[:300]}")
        if response.status_code in AWAY or response.is_server_error:
            return Trouble(failure, taken=response.status_code not in AWAY)
        return failure

    def _address(self) -> str:
        return self._url or _without_version(self._url_file.read_text().strip())

    def _pauses(self) -> Iterator[float]:
        """Seconds until the next attempts: doubling, and spread, since all requests find the server away together."""
        pause = 0.5
        while True:
            yield pause * self._random.uniform(0.5, 1.0)
            pause = min(2 * pause, LONGEST_PAUSE)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return Failure("error", f"{response.url} answered no JSON: {response.text[:300]}")


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
