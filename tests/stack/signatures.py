"""Looks up what calls.py found in the installed packages, and prints one JSON line for every use: what is wrong with it, if
anything, and whether it could be seen. A process of its own: other tests replace parts of torch.cuda."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator

import te_stand_in

if te_stand_in.is_possible():
    te_stand_in.install()

import receivers
import torch
from calls import UNKNOWN, Use, files_that_use_the_stack, uses_in

# Of what only a GPU's environment has.
ABSENT = (
    *(() if te_stand_in.is_possible() else ("transformer_engine",)),
    *(() if torch.version.cuda else ("torch._C._Cuda",)),
)
INSTANCE_ATTRIBUTE = object()  # it exists when there is an instance; what it is cannot be known without one


class Drift(Exception):
    """The installed package does not have it, or not like that."""


def main() -> None:
    seen, listed = set(), {(file, text) for file, texts in receivers.RECEIVERS.items() for text in texts}
    for file in files_that_use_the_stack():
        uses, needed = uses_in(file)
        seen |= {use.reference for use in uses}
        listed -= {(file, text) for text in needed}
        for use in uses:
            if not use.reference.startswith(ABSENT):
                print(json.dumps(examined(use)), flush=True)
    listed |= (receivers.RESULTS.keys() | receivers.FORWARDED.keys()) - seen
    print(json.dumps({"file": "receivers.py", "in_vain": sorted(map(str, listed))}))


def examined(use: Use) -> dict:
    """problem: what the packages do not have. unseen: keywords that could be renamed without a problem."""
    row = {"file": use.file, "what": f"line {use.line}: {use.kind} {use.text}", "keywords": use.keywords}
    try:
        check(use)
    except Drift as drift:
        return row | {"problem": str(drift), "unseen": []}
    return row | {"problem": None, "unseen": [keyword for keyword in use.keywords if not _notices(use, keyword)]}


def check(use: Use) -> None:
    """Raise Drift if the package has no such name, or the call does not fit its signature."""
    if use.reference == UNKNOWN:
        raise Drift("add to receivers.py what this is")
    found, drop_self = look_up(use.reference)
    if use.kind != "call" or use.reference.startswith("builtins."):
        return
    if found is INSTANCE_ATTRIBUTE:
        raise Drift(f"add to receivers.py what {use.reference} is")
    passed_on = receivers.PASSED_ON.get((use.file, use.reference))
    if use.unread_mapping and passed_on is None:
        raise Drift("add to receivers.py PASSED_ON where the keywords of ** come from")
    keywords = [*use.keywords, *(_keywords_of(*passed_on) if passed_on else [])]
    fit(use.reference, list(_signatures(found, drop_self)), use.positional, keywords, partial=use.unpacks)


def fit(
    reference: str, signatures: list[inspect.Signature], positional: int, keywords: list[str], partial=False
) -> None:
    """Raise Drift if none of the signatures takes these arguments. Keywords that end in **kwargs go to whatever
    receivers.FORWARDED names."""
    reasons = []
    for signature in signatures:
        own = {p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
        others = [keyword for keyword in keywords if keyword not in own]
        try:
            bind = signature.bind_partial if partial else signature.bind
            bind(*[None] * positional, **dict.fromkeys(keywords))
        except TypeError as error:
            reasons.append(f"{reference}: {error}")
            continue
        if others:
            _forward(reference, others)
        return
    raise Drift("; ".join(reasons) or f"{reference} has no signature that can be read")


def _forward(reference: str, keywords: list[str]) -> None:
    if reference not in receivers.FORWARDED:
        raise Drift(
            f"{reference} takes any keyword, also {', '.join(keywords)}; add to receivers.py FORWARDED who reads them"
        )
    for receiver in receivers.FORWARDED[reference]:
        fit(receiver, list(_signatures(*look_up(receiver))), 0, keywords, partial=True)


def look_up(reference: str) -> tuple[object, bool]:
    """Return (what a reference names, whether it is a method whose `self` is given). Raises Drift."""
    if ":" in reference:
        return _local_functions(*reference.split(":")), False
    path, *members = reference.split("()")
    found, drop_self = _import(path), False
    for name in "".join(members).strip(".").split(".") if members else []:
        if not name or found is INSTANCE_ATTRIBUTE:
            break
        found, drop_self = _member(found, name)
    return found, drop_self


def _import(path: str):
    """Return the module, class or function called `path`."""
    package, *names = path.split(".")
    found = importlib.import_module(package)
    for name in names:
        if not hasattr(found, name):  # a module that nobody has imported yet, or nothing
            try:
                importlib.import_module(f"{found.__name__}.{name}")
            except ModuleNotFoundError:
                raise Drift(f"{path} does not exist") from None
        found = getattr(found, name)
    return found


def _member(cls: type, name: str) -> tuple[object, bool]:
    found = inspect.getattr_static(cls, name, None)
    if name in getattr(cls, "__dataclass_fields__", ()):
        return INSTANCE_ATTRIBUTE, False
    if isinstance(found, (staticmethod, classmethod)):
        return getattr(cls, name), False
    if callable(found):
        return found, True
    if found is not None or any(name in _attributes(base) for base in cls.__mro__):
        return INSTANCE_ATTRIBUTE, False
    raise Drift(f"{cls.__module__}.{cls.__qualname__} has no {name}")


def _attributes(cls: type) -> set[str]:
    """Return what instances have: annotated fields, and what the methods assign to `self`."""
    names = set(vars(cls)) | set(vars(cls).get("__annotations__", ()))
    if cls.__module__.startswith(("builtins", "torch.nn.")):
        return names
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # compiled
        return names
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def _signatures(found, drop_self: bool) -> Iterator[inspect.Signature]:
    for one in found if isinstance(found, list) else [found]:
        try:
            signatures = [inspect.signature(one)]
        except (TypeError, ValueError):
            signatures = list(_documented_signatures(one))
        for signature in signatures:
            parameters = list(signature.parameters.values())
            yield signature.replace(parameters=parameters[1:] if drop_self else parameters)


def _documented_signatures(compiled) -> Iterator[inspect.Signature]:
    """pybind11 writes the signatures, one for each overload, into the docstring."""
    is_class = isinstance(compiled, type)
    name = "__init__" if is_class else compiled.__name__
    text = (compiled.__init__ if is_class else compiled).__doc__ or ""
    for line in re.findall(rf"^(?:\d+\. )?({name}\(.*)$", text, re.MULTILINE):
        if line != f"{name}(*args, **kwargs)":  # the heading of overloads
            (function,) = ast.parse(f"def {line}: ...").body
            yield _signature(function.args, drop_self=is_class)


def _local_functions(module: str, name: str) -> list:
    """Return the functions of a module with a name, also those that are made inside others."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    if not found:
        raise Drift(f"{module} has no function {name}")
    return [_function(node.args) for node in found]


def _signature(arguments: ast.arguments, drop_self: bool) -> inspect.Signature:
    signature = inspect.signature(_function(arguments))
    return signature.replace(parameters=list(signature.parameters.values())[1:] if drop_self else None)


def _function(arguments: ast.arguments):
    """Return a function that takes these arguments."""
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    return eval(f"lambda {ast.unparse(arguments)}: None")


def _keywords_of(module: str, called: str) -> list[str]:
    """Return the keywords with which a module calls `called`."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == called]
    if not calls:
        raise Drift(f"{module} does not call {called}")
    return sorted({keyword.arg for call in calls for keyword in call.keywords})


def _notices(use: Use, keyword: str) -> bool:
    """Return whether a renamed keyword would be found."""
    keywords = [f"{name}_" if name == keyword else name for name in use.keywords]
    try:
        check(Use(**{**vars(use), "keywords": keywords}))
    except Drift:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
