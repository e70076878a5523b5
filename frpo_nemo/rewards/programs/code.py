"""The built-in `code` reward: runs the completion's program against the tests of a data column, in `sandbox.Sandbox`. A
program that is wrong, hangs, or attempts something forbidden scores 0; a sandbox that does not start is a failure, never 0.

The sandbox doesn't receive a test's expected value, where it has one: the program's value is compared here.
"""

from __future__ import annotations

import ast
import json
import marshal
import operator
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.programs.sandbox import Sandbox

_BLOCK = re.compile(r"^( {0,3})```[ \t]*([\w.]*)(?:[ \t][^\n]*)?\r?\n(.*?)(?:^\1```|\Z)", re.DOTALL | re.MULTILINE)
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: lambda found, expected: type(found) is type(expected) and found == expected,  # for None, True and False
}


@dataclass(frozen=True)
class Comparison:
    """A test of which the sandbox receives only the expression; outside it, `compare` gets its value and `expected`."""

    expression: str
    compare: Callable[[Any, Any], bool]
    expected: Any


class CodeTests:
    """Score 1 where the program passes all of its tests, else 0; with `partial`, the share that it passes.

    column: the tests of each response, a list or a list as JSON. The tests are either assert statements (MBPP's test_list),
    run in the program's namespace, or {"input": stdin, "output": stdout}. {"inputs": [...], "outputs": [...]} (APPS) means
    the same, or, with "fn_name", arguments and results of that function. setup_column: code, or lines of it, to run before
    each assert statement. seconds: for all tests of a response together. memory_mb: MiB of address space.

    docs/rewards.md says how far a program can influence its verdict. Raises ConfigError where there is no sandbox.
    """

    def __init__(
        self,
        column: str = "tests",
        setup_column: str | None = None,
        partial: bool = False,
        seconds: float = 5.0,
        memory_mb: int = 1024,
    ) -> None:
        if seconds <= 0 or memory_mb < 64:
            raise ConfigError(f"seconds={seconds} must be above 0 and memory_mb={memory_mb} at least 64")
        self._column, self._setup_column, self._partial = column, setup_column, partial
        self._seconds, self._sandbox = seconds, Sandbox(memory_mb)

    def __call__(self, prompts, completions: list[str], **columns) -> list[float]:
        setups = columns[self._setup_column] if self._setup_column else [""] * len(completions)
        return [
            self._score(program_of(completion), _parse_tests(tests), _text(setup or ""))
            for completion, tests, setup in zip(completions, columns[self._column], setups, strict=True)
        ]

    def _score(self, program: str, tests: list, setup: str) -> float:
        if isinstance(tests[0], tuple):
            passed = self._passed_pairs(program, tests)
        else:
            passed = self._passed_asserts(program, tests, setup)
        return passed / len(tests) if self._partial else float(passed == len(tests))

    def _passed_asserts(self, program: str, tests: list[str | Comparison], setup: str) -> int:
        nonce = secrets.token_hex(16)
        parts = [_open_comparison(test) if isinstance(test, str) else test for test in tests]
        inside = [(part.expression, True) if part else (test, False) for test, part in zip(tests, parts, strict=True)]
        run = self._sandbox.run(program, self._seconds, tests=marshal.dumps([nonce, setup, inside]))
        lines = run.output.decode(errors="replace").split("\n")
        verdicts = [line.removeprefix(nonce) if line.startswith(nonce) else "" for line in lines]
        return sum(
            _holds(verdict, part) if part else verdict == "1" for verdict, part in zip(verdicts, parts, strict=False)
        )

    def _passed_pairs(self, program: str, pairs: list[tuple[str, str]]) -> int:
        passed, left = 0, self._seconds
        for given, expected in pairs:
            run = self._sandbox.run(program, left, stdin=given.encode())
            right = run.exit_code == 0 and _lines(run.output.decode(errors="replace")) == _lines(expected)
            passed, left = passed + right, left - run.seconds
            if left <= 0 or not (right or self._partial):
                break
        return passed


def program_of(completion: str) -> str:
    """Return the last block fenced as Python; else the last one fenced without a language; else the whole text. An
    unclosed fence reaches to the end."""
    blocks = [
        (language.lower(), _dedented(program, indent)) for indent, language, program in _BLOCK.findall(completion)
    ]
    python = [program for language, program in blocks if re.fullmatch(r"python[\d.]*|py", language)]
    unnamed = [program for language, program in blocks if not language]
    return (python or unnamed or [completion])[-1]


def _dedented(program: str, indent: str) -> str:
    """Remove the indentation of the program's fence, as in an item of a list."""
    return re.sub(f"^{indent}", "", program, flags=re.MULTILINE) if indent else program


def _open_comparison(test: str) -> Comparison | None:
    """Return the comparison in a test of the form `assert expression == literal`, or with another comparison operator; None
    for any other test."""
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError):
        return None
    match body:
        case [ast.Assert(test=ast.Compare(left=left, ops=[comparison], comparators=[right]))]:
            sides = [(left, right), (right, left)] if isinstance(comparison, ast.Eq) else [(left, right)]
            for expression, literal in sides:
                if type(comparison) in _COMPARISONS and _is_literal(literal, comparison):
                    compare, expected = _COMPARISONS[type(comparison)], ast.literal_eval(literal)
                    return Comparison(ast.unparse(expression), compare, expected)
    return None


def _is_literal(node: ast.expr, comparison: ast.cmpop) -> bool:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return not isinstance(comparison, ast.Is) or value is None or isinstance(value, bool)


def _holds(verdict: str, comparison: Comparison) -> bool:
    """Check a program's output against the test; the output is untrusted."""
    try:
        return bool(comparison.compare(_decode(json.loads(verdict)), comparison.expected))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return False


def _decode(value: Any) -> Any:
    """Decode what `sandbox_child.tagged` encoded."""
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind == "dict":
        return {_decode(key): _decode(item) for key, item in content}
    if kind in ("bytes", "complex"):
        return bytes.fromhex(content) if kind == "bytes" else complex(*content)
    return {"list": list, "tuple": tuple, "set": set}[kind](map(_decode, content))


def _parse_tests(value: Any) -> list[str] | list[Comparison] | list[tuple[str, str]]:
    """Return the tests of a column's value. Raises ValueError where there are none."""
    tests = json.loads(value) if isinstance(value, str) else value
    if isinstance(tests, dict):
        pairs = list(zip(tests["inputs"], tests["outputs"], strict=True))
        if pairs and tests.get("fn_name"):
            return [_call(tests["fn_name"], given, expected) for given, expected in pairs]
        tests = [{"input": given, "output": expected} for given, expected in pairs]
    if not isinstance(tests, list) or not tests:
        raise ValueError(f"no tests: {str(value)[:80]!r}")
    if all(isinstance(test, str) for test in tests):
        return tests
    return [(_text(test["input"]), _text(test["output"])) for test in tests]


def _text(value: Any) -> str:
    """Return text, or a list of its lines as text. Raises ValueError for anything else."""
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError(f"neither text nor a list of lines: {str(value)[:80]!r}")
    return "\n".join(lines)


def _call(name: str, arguments: Any, expected: Any) -> Comparison:
    """Return the test of a function, or of a method of a class Solution, in APPS's form. Raises ValueError."""
    if not isinstance(arguments, list) or not name.isidentifier():
        raise ValueError(f"the arguments of {name} aren't a list: {str(arguments)[:80]!r}")
    listed = ", ".join(repr(_with_numbers_as_keys(argument)) for argument in arguments)
    ast.literal_eval(f"[{listed}]")  # raises ValueError for what has no literal, such as NaN
    return Comparison(f"({name} if {name!r} in globals() else Solution().{name})({listed})", _is_result, expected)


def _with_numbers_as_keys(value: Any) -> Any:
    """Restore the whole-number keys of dicts, which JSON made strings, as APPS's own tests do."""
    if isinstance(value, list):
        return [_with_numbers_as_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    numbers = all(re.fullmatch(r"-?\d+", key) for key in value)
    return {int(key) if numbers else key: _with_numbers_as_keys(item) for key, item in value.items()}


def _is_result(value: Any, expected: Any) -> bool:
    """Return whether a function's value is the one APPS's tests expect, perhaps inside a list. Tuples count as lists."""
    value = _as_json_has_it(value)
    return value == expected or (isinstance(expected, list) and len(expected) == 1 and value == expected[0])


def _as_json_has_it(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_json_has_it(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _as_json_has_it(item) for key, item in value.items()}
    return value


def _lines(output: str) -> list[str]:
    """Split output into lines without spaces at their ends or empty lines at the end, neither of which counts."""
    return [line.rstrip() for line in output.rstrip().split("\n")]
