#!/usr/bin/env bash
# evalplus 0.3.1 does not run the program that a model wrote, but what its sanitiser leaves of it: import statements, and
# those functions with a return, classes and single-name assignments at the top level that the function asked for depends
# on, the first of each name. Decorated functions and classes are another kind of syntax node and disappear, although a
# helper that uses them stays; so do generators without a return, A, B = 1, 2, A += 1, and if, for, try and with at
# the top level. Right programs fail with a NameError.
#
# Seen with evalplus 0.3.1, Python 3.11. Source: evalplus/sanitize.py, extract_target_code_or_empty.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q -q --disable-pip-version-check install "setuptools<81" wheel
"$work/env/bin/pip" -q -q --disable-pip-version-check install --no-build-isolation evalplus==0.3.1
cd "$work"
XDG_CACHE_HOME=$work/cache "$work/env/bin/python" - <<'P'
import sys

from evalplus.sanitize import sanitize

programs = {
    "plain": "B = 1\ndef g(x):\n    return x + B\ndef f(x):\n    return g(x)",
    "decorated function": "from functools import cache\n@cache\ndef g(x):\n    return x\ndef f(x):\n    return g(x)",
    "decorated class": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x):\n    return A(x).x",
    "generator": "def g(x):\n    yield x\ndef f(x):\n    return next(g(x))",
    "A, B = 1, 2": "A, B = 1, 2\ndef f(x):\n    return x * A",
    "if": "if True:\n    A = 1\ndef f(x):\n    return x * A",
    "second definition": "def f(x):\n    return 0\ndef f(x):\n    return x",
}


def answer(program):
    names = {}
    try:
        exec(program, names)
        return names["f"](3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


found = {name: (answer(program), answer(sanitize(program, "f"))) for name, program in programs.items()}
for name, (written, scored) in found.items():
    print(f"{name + ':':20} as written f(3) = {written}, as scored {scored}")
lost = [name for name, (written, scored) in found.items() if written != scored]
sys.exit(0 if lost == [name for name in programs if name != "plain"] else 1)
P
