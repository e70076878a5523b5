#!/usr/bin/env bash
# latex2sympy2_extended 1.11.0, the parser of math-verify 0.9.0, takes a number in parentheses after a number for the
# fraction of a mixed number and adds it: `2(3)` and `(2)(3)` are 5, `-2(3)` is -5, `1-2(3)` is -4, and so `4 2` is 6. LaTeX
# writes a product so. ConversionConfig(interpret_as_mixed_fractions=False) changes nothing. math-verify therefore accepts
# \boxed{2(3)} for the gold answer 5 and refuses it for 6; with a letter (`2(x)`) or a sum (`2(3-1)`) the product is read.
#
# Seen with latex2sympy2_extended 1.11.0, math-verify 0.9.0, sympy 1.14.0, antlr4-python3-runtime 4.9.3, Python 3.11.
# Source: latex2sympy2_extended/latex2sympy2.py, "Support for mixed fractions", which looks at the last factor only.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install \
  latex2sympy2_extended==1.11.0 math-verify==0.9.0 sympy==1.14.0 antlr4-python3-runtime==4.9.3

"$work/env/bin/python" - <<'PYTHON'
import sys

from latex2sympy2_extended import latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import parse, verify

products = {"2(3)": 6, "(2)(3)": 6, "-2(3)": -6, "1-2(3)": -5}
config = ConversionConfig(interpret_as_mixed_fractions=False)
seen = {text: latex2sympy(text).doit() for text in products}
without_mixed = {text: latex2sympy(text, conversion_config=config).doit() for text in products}
for text, product in products.items():
    print(f"{text:8} is {product:3}; latex2sympy: {seen[text]}, without mixed fractions: {without_mixed[text]}")
boxed = parse("$\\boxed{2(3)}$")
accepted = {gold: verify(parse(f"${gold}$"), boxed) for gold in (5, 6)}
print(f"math-verify of \\boxed{{2(3)}} against 5: {accepted[5]}, against 6: {accepted[6]}")
as_sum = {"2(3)": 5, "(2)(3)": 5, "-2(3)": -5, "1-2(3)": -4}
sys.exit(not (seen == without_mixed == as_sum and accepted == {5: True, 6: False}))
PYTHON
