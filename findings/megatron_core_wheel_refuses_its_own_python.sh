#!/usr/bin/env bash
# megatron-core 0.19.2 publishes a wheel for CPython 3.11 (cp311-cp311-manylinux) whose own metadata says
# Requires-Python: >=3.12. On Python 3.11 every installer therefore passes over it and takes 0.16.1, the last release that
# allows 3.11, without a word: `pip install megatron-core` gives a model library that is three releases old. With
# --ignore-requires-python pip installs the wheel, its compiled helper included, and `import megatron.core` works.
#
# Seen with megatron-core 0.19.2 and 0.16.1, Python 3.11, pip. Source: the METADATA of the wheel.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
pip=("$work/env/bin/pip" -q --disable-pip-version-check)

"${pip[@]}" download --no-deps -d "$work/plain" "megatron-core<=0.19.2"
"${pip[@]}" download --no-deps --ignore-requires-python -d "$work/forced" megatron-core==0.19.2
plain=$(basename "$work"/plain/*) forced=$(basename "$work"/forced/*)
requires=$("$work/env/bin/python" -c "
import glob, zipfile
wheel = zipfile.ZipFile(glob.glob('$work/forced/*.whl')[0])
text = wheel.read(next(n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))).decode()
print(next(line for line in text.splitlines() if line.startswith('Requires-Python')))")
echo "Python 3.11, pip chooses:               $plain"
echo "with --ignore-requires-python:          $forced"
echo "in that wheel:                          $requires"
[[ $plain == megatron_core-0.16.1-* && $forced == megatron_core-0.19.2-cp311-* && $requires == *">=3.12"* ]]
