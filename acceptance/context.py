"""The arguments of a check."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Context:
    """Where a check runs. work: a directory for models and runs, shared by all groups and removed at the end. cuda: False where
    CPU processes stand in for GPUs. closing: what must be shut down before the process ends."""

    work: Path
    cuda: bool
    closing: ExitStack = field(default_factory=ExitStack)

    def on(self, *, cuda: Any, cpu: Any) -> Any:
        """Choose a size for the GPU, or its stand-in for a CPU."""
        return cuda if self.cuda else cpu
