"""What runs inside the sandbox, given to Python as text, so from the standard library alone: give up what is left of
power, say so, run the program. It is no wall: the program shares its interpreter, and the sandbox is around both."""

import builtins
import json
import marshal
import os
import resource
import sys
import types

READY = b"sandboxed\n"  # what comes before this on stdout is why the sandbox did not start


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
    if uid is not None:  # root on the host: now nobody, which ends its capabilities and makes the limit on threads hold
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
    """The program as the module of this name. In place of this file's own in sys.modules, if it is __main__."""
    for quitting in ("exit", "quit"):
        setattr(builtins, quitting, sys.exit)  # by the module `site`, if there were one
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(program, "program.py", "exec"), module.__dict__)
    return module


def run_tests(program, tests_fd, verdicts):
    """Write a line for each test that ran: the nonce, then of an expression its value (`as_json`), of a statement 1, and
    of what raised nothing. Nonce, set-up code and tests, marshalled, are read when the program is loaded, by functions that
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
    """A value of built-in types, or of types derived from them, or a number; code.py reads it. TypeError for another."""
    return json.dumps(tagged(value))


def tagged(value):
    """JSON's own scalars as they are, the rest as [type, content]."""
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
