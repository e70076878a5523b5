"""Time each phase of a step, and report the current one to the watchdog."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class PhaseTimer:
    """Measure the seconds of each phase of a step, and report the phase to the watchdog: `with phases("generate"): ...`.

    Phases may nest; an inner phase's time does not count for the outer one. The loop sets `step`, and calls `pop` once
    per step. On CUDA a phase ends with a synchronisation, or its time would be that of launching kernels.
    """

    def __init__(self, watchdog=None):
        self.step = 0
        self._watchdog = watchdog
        self._open: list[str] = []
        self._seconds: dict[str, float] = {}
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        self._enter(name)
        completed = False
        try:
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            completed = True
        finally:
            self._charge()
            self._open.pop()
            if completed:  # otherwise the watchdog's message must name this phase
                self._enter(self._open[-1] if self._open else "other")

    def pop(self) -> dict[str, float]:
        """Return seconds/NAME of each phase since the last pop, seconds/other outside of them, and seconds/step in all."""
        self._charge()
        seconds, self._seconds = {"other": 0.0} | self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()} | {"seconds/step": sum(seconds.values())}

    def _charge(self) -> None:
        now = time.perf_counter()
        name = self._open[-1] if self._open else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._mark
        self._mark = now

    def _enter(self, name: str) -> None:
        if self._watchdog is not None:
            self._watchdog.enter(name, self.step)
