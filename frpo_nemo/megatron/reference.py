"""The reference policy of full training: a copy of the weights on the CPU, fixed, or updated from the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Module


class Reference:
    """The weights of `model` as they are now. moved: whether they are no longer the first ones, and so are saved."""

    @torch.no_grad()
    def __init__(self, model: Module):
        self._weights = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()}
        self._average: dict[str, Tensor] | None = None  # fp32: in bf16, small steps of an average would round to none
        self.moved = False

    @torch.no_grad()
    def update(self, model: Module, mix: float) -> None:
        """Become mix * model + (1 - mix) * what this was."""
        self.moved = True
        if mix < 1 and self._average is None:
            self._average = {name: weight.float() for name, weight in self._weights.items()}
        for name, parameter in model.named_parameters():
            if self._average is not None:
                self._average[name].lerp_(parameter.detach().float().cpu(), mix)
                self._weights[name].copy_(self._average[name])
            else:
                self._weights[name].copy_(parameter)

    @contextmanager
    def inside(self, model: Module) -> Iterator[None]:
        """Put the reference's weights into the model; put the policy's back on exit."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: Module) -> None:
        for name, parameter in model.named_parameters():
            current = parameter.detach().to("cpu", copy=True)
            parameter.copy_(self._weights[name])
            self._weights[name] = current

    def saved(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of it, by parameter."""
        return self._weights if self._average is None else self._average

    def prepare_to_load(self, average: bool) -> None:
        """Make `saved` return tensors for what a checkpoint holds: an average in fp32, or weights."""
        self._average = {name: weight.float() for name, weight in self._weights.items()} if average else None

    def restore(self, loaded: dict[str, Tensor]) -> None:
        """Become what a checkpoint holds."""
        self.moved = True
        for name, value in loaded.items():
            self.saved()[name].copy_(value)
            self._weights[name].copy_(value)

    @property
    def averages(self) -> bool:
        return self._average is not None
