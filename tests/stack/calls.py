"""Finds, by reading our sources, every use of a name of the GPU stack: what is imported, which attributes are read or set,
and with which arguments what is called. Pure Python; signatures.py looks the names up in the installed packages.

A reference is a dotted path. "vllm.LLM().sleep" is the method of an instance: "()" after a class means one of it.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path

import receivers

SOURCES = Path(__file__).parents[2]
PACKAGES = ("frpo_nemo", "acceptance")
STACK = ("megatron", "vllm", "transformer_engine", "torch.cuda", "torch.distributed")
UNKNOWN = "?"  # what a function of the stack returned, when receivers.RESULTS does not say


@dataclass
class Use:
    """kind: import, attribute or call. Of a call: number of positional arguments, keywords, and whether more are unpacked
    (`*args`) or come from a mapping that could not be read (`**settings`)."""

    kind: str
    reference: str
    file: str
    line: int
    text: str
    positional: int = 0
    keywords: list[str] = field(default_factory=list)
    unpacks: bool = False
    unread_mapping: bool = False


def files_that_use_the_stack() -> list[str]:
    """Relative to the repository."""
    paths = [path for package in PACKAGES for path in sorted((SOURCES / package).rglob("*.py"))]
    return [file for path in paths if uses_in(file := path.relative_to(SOURCES).as_posix())[0]]


def uses_in(file: str) -> tuple[list[Use], set[str]]:
    """Return all uses in a file, and which of its entries in receivers.RECEIVERS were needed."""
    tree = ast.parse((SOURCES / file).read_text())
    reader = _Reader(file, tree)
    reader.visit(tree)
    reader.uses, reader.known = [], reader.known | reader.kept
    reader.visit(tree)  # again, now that it is known what the objects keep in `self`
    return reader.uses, reader.needed


def _belongs(reference: str) -> bool:
    return (
        reference == UNKNOWN
        or "()" in reference
        or any(reference == name or reference.startswith(f"{name}.") for name in STACK)
    )


class _Reader(ast.NodeVisitor):
    def __init__(self, file: str, tree: ast.Module):
        self.file, self.receivers = file, receivers.RECEIVERS.get(file, {})
        self.uses: list[Use] = []
        self.needed: set[str] = set()
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        self.known: dict[str, list[str]] = {}  # expression -> references, in the scope that is being read
        self.kept: dict[str, list[str]] = {}  # the same of `self.x`, in any scope
        self.within: list[ast.FunctionDef] = []

    def references(self, node: ast.expr) -> list[str]:
        """Return what an expression may be; nothing if it is not of the stack."""
        text = ast.unparse(node)
        if text in self.receivers:
            self.needed.add(text)
            return self.receivers[text]
        if text in self.known:
            return self.known[text]
        if isinstance(node, ast.Attribute):
            return [r if r == UNKNOWN else f"{r}.{node.attr}" for r in self.references(node.value)]
        if isinstance(node, ast.Call):
            return [result for r in self.references(node.func) if _belongs(r) for result in _results(r)]
        return []

    def _of_stack(self, node: ast.expr) -> list[str]:
        return [reference for reference in self.references(node) if _belongs(reference)]

    # -- what the scope knows

    def _learn_import(self, name: ast.alias, module: str | None) -> None:
        bound = name.asname or name.name.partition(".")[0]
        self.known[bound] = [f"{module}.{name.name}" if module else (name.name if name.asname else bound)]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = dict(self.known)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.known.pop(argument.arg, None)
            self._learn_type(argument.arg, argument.annotation)
        self.within.append(node)
        self.generic_visit(node)
        self.within.pop()
        self.known = outside

    def _learn_type(self, name: str, annotation: ast.expr | None) -> None:
        if annotation is not None and (found := self._of_stack(annotation)):
            self.known[name] = [f"{reference}()" for reference in found]

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            text, found = ast.unparse(target), self._of_stack(node.value)
            if isinstance(target, ast.Name):
                self.known[text] = found
            elif text.startswith("self.") and found:
                self.kept[text] = self.known[text] = found

    def visit_If(self, node: ast.If) -> None:
        """Take x as a C inside `if isinstance(x, C)`."""
        self.visit(node.test)
        before = dict(self.known)
        for test in ast.walk(node.test):
            if isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance":
                self._learn_type(ast.unparse(test.args[0]), test.args[1])
        for statement in node.body:
            self.visit(statement)
        self.known = before
        for statement in node.orelse:
            self.visit(statement)

    # -- what is used

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self._learn_import(name, None)
            self._add("import", name.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for name in node.names:
            self._learn_import(name, node.module)
            self._add("import", f"{node.module}.{name.name}", node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for reference in self.references(node.value) if self.references(node) else []:
            self._add("attribute", reference if reference == UNKNOWN else f"{reference}.{node.attr}", node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for reference in self.references(node.func):
            self._add_call(reference, node, node.args, node.keywords)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "collective_rpc":
            self._add_remote_call(node)
        self.generic_visit(node)

    def _add_remote_call(self, node: ast.Call) -> None:
        """vLLM's collective_rpc("method", kwargs={...}) calls the method of every worker."""
        (method, *_), given = node.args, {keyword.arg: keyword.value for keyword in node.keywords}
        keywords = [ast.keyword(key.value, key) for key in given["kwargs"].keys] if "kwargs" in given else []
        for worker in receivers.WORKERS:
            self._add_call(f"{worker}.{method.value}", node, [], keywords)

    def _add_call(self, reference: str, node: ast.Call, arguments: list[ast.expr], keywords: list[ast.keyword]) -> None:
        keys = [[keyword.arg] if keyword.arg else self._keys(keyword.value) for keyword in keywords]
        starred = sum(isinstance(argument, ast.Starred) for argument in arguments)
        self._add(
            "call",
            reference,
            node,
            positional=len(arguments) - starred,
            keywords=[key for known in keys for key in known or []],
            unpacks=starred > 0,
            unread_mapping=None in keys,
        )

    def _add(self, kind: str, reference: str, node: ast.AST, **more) -> None:
        if _belongs(reference):
            text = ast.unparse(node.func if isinstance(node, ast.Call) else node)
            self.uses.append(Use(kind, reference, self.file, node.lineno, text, **more))

    def _keys(self, mapping: ast.expr) -> list[str] | None:
        """Return the keys of `mapping` in f(**mapping), where it is made in the same file."""
        if isinstance(mapping, ast.Call) and ast.unparse(mapping.func) in self.functions:
            return _keys_of_dicts(self.functions[ast.unparse(mapping.func)])
        function = self.within[-1] if self.within else None
        if function and function.args.kwarg and function.args.kwarg.arg == ast.unparse(mapping):
            calls = [call for call in self.calls if ast.unparse(call.func) == function.name]
            return sorted({keyword.arg for call in calls for keyword in call.keywords if keyword.arg})
        return None


def _results(reference: str) -> list[str]:
    """Return what a call returns: an instance if a class is called."""
    if reference in receivers.RESULTS:
        return receivers.RESULTS[reference]
    name = reference.rpartition(".")[2].lstrip("_")
    return [f"{reference}()" if name[:1].isupper() else UNKNOWN]


def _keys_of_dicts(function: ast.FunctionDef) -> list[str]:
    """Return the keys of every dict that is written in a function."""
    keys = []
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
            keys += [keyword.arg for keyword in node.keywords if keyword.arg]
        elif isinstance(node, ast.Dict):
            keys += [key.value for key in node.keys if isinstance(key, ast.Constant)]
    return keys
