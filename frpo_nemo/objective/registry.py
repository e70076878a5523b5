"""Find objectives by name: after `@register_objective("mine")` on an Objective, `name: mine` selects it."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from frpo_nemo.errors import ConfigError
from frpo_nemo.objective.base import Objective

T = TypeVar("T", bound=type[Objective])
_registered: dict[str, type[Objective]] = {}


def register_objective(name: str) -> Callable[[T], T]:
    """Return a class decorator that registers an objective. Raises ValueError if another class has the name."""

    def register(cls: T) -> T:
        if name in _registered:
            raise ValueError(f"The objective name {name!r} of {cls.__name__} is taken by {_registered[name].__name__}.")
        _registered[name] = cls
        return cls

    return register


def build_objective(config: Mapping[str, Any]) -> Objective:
    """Return the objective of {name: "frpo", **fields}, or {_target_: "module.Class", **fields} for a user's own.

    Takes a dict or an OmegaConf DictConfig. Raises ConfigError for a wrong name, field or value.
    """
    # A DictConfig lists a key whose value is "???", but does not contain it: it counts as not given.
    fields = {key: config[key] for key in config if key in config}
    name, target = fields.pop("name", None), fields.pop("_target_", None)
    if (name is None) == (target is None):
        raise ConfigError(
            f"objective needs a name ({_listed(_registered)}) or a _target_ (module.Class): exactly one of the two."
        )
    cls = _by_name(name) if target is None else _by_path(target)
    _check_fields(cls, name or target, fields)
    return cls(**fields)


def _by_name(name: Any) -> type[Objective]:
    if str(name) not in _registered:
        raise ConfigError(
            f"objective.name={name!r} is not a registered objective{_nearest(name, _registered)}; "
            f"there are {_listed(_registered)}."
        )
    return _registered[str(name)]


def _by_path(path: Any) -> type[Objective]:
    module_name, _, class_name = str(path).rpartition(".")
    if not module_name:
        raise ConfigError(
            f"objective._target_={path!r} must be an import path such as my_package.my_module.MyObjective."
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"objective._target_={path!r} cannot be imported: {error}.") from error
    cls = getattr(module, class_name, None)
    if not inspect.isclass(cls):
        raise ConfigError(f"objective._target_={path!r}: the module {module_name} has no class {class_name}.")
    if not issubclass(cls, Objective):
        raise ConfigError(f"objective._target_={path!r} must be a subclass of frpo_nemo.objective.Objective.")
    return cls


def _check_fields(cls: type[Objective], label: Any, given: Mapping[str, Any]) -> None:
    known = inspect.signature(cls).parameters
    for field in given:
        if field not in known and field in cls.absent:
            raise ConfigError(f"objective.{field} is not a field of {label}: {cls.absent[field]}.")
        if field not in known:
            raise ConfigError(
                f"objective.{field} is not a field of {label}{_nearest(field, known)}; its fields are {_listed(known)}."
            )
    for field, parameter in known.items():
        if parameter.default is parameter.empty and field not in given:
            raise ConfigError(f"objective.{field} must be set for {label}.")


def _nearest(word: str, options: Iterable[str]) -> str:
    matches = difflib.get_close_matches(str(word), list(options), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
