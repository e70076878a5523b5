"""Finds a reward function by name and calls it so that whatever it does, the caller sees values and `Failure`s, never an
exception.

A reward is a callable `(prompts, completions, **columns) -> list[float | None]`, or a class whose instances
are; it is called with keywords only, so a function that ignores prompts may leave them to **columns (as in
TRL). Shared by the training process and the reward workers, so it imports nothing heavy.
"""

from __future__ import annotations

import ast
import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frpo_nemo import redact
from frpo_nemo.errors import ConfigError

BUILT_IN = {
    "math": "frpo_nemo.rewards.math_answers.grade.math_answer",
    "exact": "frpo_nemo.rewards.builtin.exact_answer",
    "format": "frpo_nemo.rewards.builtin.format_match",
    "regex": "frpo_nemo.rewards.builtin.regex_search",
    "one_boxed": "frpo_nemo.rewards.builtin.one_boxed",
    "length": "frpo_nemo.rewards.builtin.length_penalty",
    "code": "frpo_nemo.rewards.programs.code.CodeTests",
    "chat_judge": "frpo_nemo.rewards.models.chat_judge.ChatJudge",
    "judge": "frpo_nemo.rewards.models.judge.Judge",
    "moderation": "frpo_nemo.rewards.models.safety.Moderation",
    "reward_model": "frpo_nemo.rewards.models.classifiers.RewardModel",
    "safety": "frpo_nemo.rewards.models.safety.Safety",
}


@dataclass(frozen=True)
class Failure:
    """A response that a reward could not score. kind: error, timeout or died."""

    kind: str
    message: str


Outcome = float | None | Failure


def load_target(target: str) -> Callable:
    """Return the callable of a built-in name, `package.module.function` or `path/to/file.py:function`.

    Raises ConfigError when there is none, or when its module fails to import for any reason.
    """
    path = BUILT_IN.get(target, target)
    module_name, _, name = path.rpartition(":") if ":" in path else path.rpartition(".")
    if not module_name:
        close = difflib.get_close_matches(target, BUILT_IN, n=1)
        raise ConfigError(
            f"'{target}' is neither a built-in reward ({', '.join(BUILT_IN)}) nor package.module.function "
            "nor path/to/file.py:function" + (f"; did you mean '{close[0]}'?" if close else "")
        )
    try:
        is_file = module_name.endswith(".py")
        module = _load_file(Path(module_name).expanduser()) if is_file else importlib.import_module(module_name)
    except (Exception, SystemExit) as problem:
        raise ConfigError(f"'{target}' cannot be imported: {type(problem).__name__}: {problem}") from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"'{target}': {module_name} has no function '{name}'")
    return function


@dataclass(frozen=True)
class Bound:
    """`function` with the arguments that every call passes to it; they take precedence over columns of the same name.
    options: names that no column may fill."""

    function: Callable
    args: dict[str, Any]
    options: frozenset[str] = frozenset()

    def __call__(self, prompts: list, completions: list[str], columns: dict[str, list]) -> Any:
        """Call the function with copies, which it may change: responses share the prompt and columns of their example."""
        own = {name: [*map(copy.deepcopy, values)] for name, values in columns.items() if name not in self.options}
        own |= copy.deepcopy(self.args)
        return self.function(prompts=[*map(copy.deepcopy, prompts)], completions=list(completions), **own)

    def load(self) -> None:
        """Run the reward's slow start, once before the first call: its class's method `load`, if it has one."""
        getattr(self.function, "load", lambda: None)()

    def local_weights(self) -> list:
        """Return the LocalWeights (local.py) that `load` will read; only built-in rewards report them."""
        return getattr(self.function, "local_weights", list)()


def bind(target: str, args: dict[str, Any]) -> Bound:
    """Return the reward `target` with its `args`: a class is instantiated with them, once; a function receives them
    with every call."""
    redact.remember(args)  # the function's error messages may quote them
    function, args = load_target(target), copy.deepcopy(args)
    if inspect.isclass(function):
        scorer: Any = function(**args)
        return Bound(scorer, {})
    return Bound(function, args, options(target, function))


def options(target: str, function: Callable) -> frozenset[str]:
    """Return the names that no data column may fill: a built-in reward's parameters that aren't lists. In any other
    function every parameter may be a column, as in TRL."""
    if target not in BUILT_IN and target not in BUILT_IN.values():
        return frozenset()
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation is not list)


def call_batch(function: Callable, prompts: list, completions: list[str], columns: dict[str, list]) -> list[Outcome]:
    """Call once for all responses; if that raises, once for each, so that a bad response fails alone."""
    try:
        return [as_outcome(v) for v in _checked_length(function(prompts, completions, columns), len(completions))]
    except (Exception, SystemExit):  # noqa: BLE001 - a reward may throw anything
        rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
        return [call_one(function, *response) for response in zip(prompts, completions, rows, strict=True)]


def call_one(function: Callable, prompt: Any, completion: str, row: dict[str, Any]) -> Outcome:
    """Score one response alone; `row` is its columns."""
    try:
        columns = {name: [value] for name, value in row.items()}
        (value,) = _checked_length(function([prompt], [completion], columns), 1)
        return as_outcome(value)
    except (Exception, SystemExit) as problem:  # noqa: BLE001 - a reward may throw anything
        return Failure("error", redact.text(f"{type(problem).__name__}: {problem}"))


def as_outcome(value: Any) -> Outcome:
    """Return as an outcome what a reward returned for one response: None, a finite number (also of numpy, or a tensor), or
    a failure, which a reward may also return itself."""
    if value is None:
        return None
    if isinstance(value, Failure):
        return Failure(value.kind, redact.text(value.message))
    if not isinstance(value, numbers.Real) and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return Failure("error", f"returned {str(value)[:80]!r}, which isn't a finite number")


def _checked_length(values: Any, expected: int) -> list:
    values = list(values)
    if len(values) != expected:
        raise ValueError(f"returned {len(values)} values for {expected} responses")
    return values


def _load_file(path: Path):
    # Named by the full path, so that two files with the same name do not replace each other in sys.modules.
    name = f"reward_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        _let_import_siblings(path.resolve())
        sys.modules[name] = module  # before it runs: dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _let_import_siblings(file: Path) -> None:
    """Let a reward file import the modules in its directory, as a script could, also later, inside its functions. The
    directory is searched last, so that no module hides a library's; one whose name is taken is refused."""
    directory = file.parent
    if str(directory) not in sys.path:
        sys.path.append(str(directory))
    importlib.invalidate_caches()
    for name, sibling in _imported_siblings(file, directory, {}).items():
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin and spec.has_location else None
        if found != sibling:
            raise ImportError(
                f"{file.name} imports {name}, a module in its own directory, but another has that name ({found or name}): "
                f"rename {sibling.relative_to(directory)}"
            )


def _imported_siblings(file: Path, directory: Path, known: dict[str, Path]) -> dict[str, Path]:
    """Add to `known` the modules of `directory` that `file` imports, directly or through each other: name -> file. Python's
    own modules take precedence."""
    nodes = list(ast.walk(ast.parse(file.read_bytes(), file)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    for name in {name.partition(".")[0] for name in names} - known.keys() - sys.stdlib_module_names:
        for sibling in (directory / f"{name}.py", directory / name / "__init__.py"):
            if sibling.is_file():
                known[name] = sibling
                _imported_siblings(sibling, directory, known)
    return known
