"""Runs inside the sandbox, given to Python as text, so it uses the standard library alone. Drops the remaining
privileges, signals readiness, runs the program. No boundary by itself: the sandbox is around both."""

import builtins
import json
import marshal
import os
import resource
import sys
import types

READY = b"sandboxed\n"  # whatever comes before this on stdout is why the sandbox did not start


def main(uid, seconds, memory, threads, open_files, program_fd, tests_fd=None):
    """Run the program of `program_fd` as a script, or, given `tests_fd`, as a module and then its tests."""
    confine(uid, seconds, memory, threads, open_files)
    program = read(program_fd)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 2)
    os.write(1, READY)
    if tests_fd is None:
        load(program, "__main__")
        return
    verdicts = os.dup(1)
    os.dup2(nothing, 0), os.dup2(nothing, 1)
    run_tests(program, tests_fd, verdicts)


def confine(uid, seconds, memory, threads, open_files):
    if uid is not None:  # root on the host becomes nobody: no capabilities, and the limit on threads applies
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    limits = {"AS": memory, "NPROC": threads, "NOFILE": open_files, "CORE": 0, "FSIZE": 0, "CPU": seconds}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def read(fd):
    with open(fd, "rb") as file:
        return file.read()


def load(program, name):
    """Load the program as the module of this name; __main__ replaces this file's own in sys.modules."""
    for quitting in ("exit", "quit"):
        setattr(builtins, quitting, sys.exit)  # as the module `site` would, which isn't loaded
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, "program.py", "exec"), module.__dict__)
    return module


def run_tests(program, tests_fd, verdicts):
    """Write a line for each test that ran: the nonce, then an expression's value (`as_json`), or 1 for a statement that
    raised nothing. The nonce, set-up code and tests, marshalled, are read once the program is loaded, by functions that
    were taken before; a program that ends the interpreter ends its verdicts."""
    run, value, write, parse, end, failure = exec, eval, os.write, marshal.loads, os._exit, BaseException
    read_tests, encode, builtin, as_is = read, as_json, vars(builtins), dict(vars(builtins))
    program = load(program, "program").__dict__
    builtin.update(as_is)
    nonce, setup, tests = parse(read_tests(tests_fd))
    for test, is_expression in tests:
        builtin.update(as_is)
        try:
            if is_expression:
                run(setup, program)
                verdict = encode(value(test, program))
            else:
                run(f"{setup}\n{test}", program)
                verdict = "1"
        except failure:
            verdict = ""
        write(verdicts, f"{nonce}{verdict}\n".encode())
    end(0)


def as_json(value):
    """Encode a value of built-in types, or types derived from them, or a number; code.py reads it. Else TypeError."""
    return json.dumps(tagged(value))


def tagged(value):
    """Return JSON's own scalars as they are, the rest as [type, content]."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, dict):
        return ["dict", [[tagged(key), tagged(item)] for key, item in value.items()]]
    collections: dict = {"list": list, "tuple": tuple, "set": (set, frozenset, type({}.keys()))}
    for name, kinds in collections.items():
        if isinstance(value, kinds):
            return [name, [tagged(item) for item in value]]
    if float(value) == value:  # Fraction, Decimal
        return float(value)
    raise TypeError(value)
