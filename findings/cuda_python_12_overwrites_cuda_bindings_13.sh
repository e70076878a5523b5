#!/usr/bin/env bash
# cuda-python 12.6.2.post1 has its own copies of 28 files that belong to cuda-bindings 13.5.0, names no dependency on it, and
# so puts them over those of the newer package. Both installers take this for a consistent environment: `pip check` says
# "No broken requirements found". `cuda.bindings.runtime` then lacks names that cuda-bindings 13 has, such as cudaLibrary_t.
# A resolver reaches this pair by itself: flashinfer-python 0.7 asks for cuda-python>=12.0, and one that has settled on the
# newest cuda-bindings first goes back to the last cuda-python that does not name it. megatron-core 0.18 and 0.19 import
# flashinfer where it is installed, which ends with the AttributeError and not with an ImportError, so they do not import.
#
# Seen with cuda-bindings 13.5.0, cuda-python 12.6.2.post1, Python 3.12, pip; no GPU is needed. Source: the RECORD files of
# the two wheels; uv 0.13.9 resolving vllm==0.33.0 for Python 3.12 without a bound on cuda-python.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.12*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.12}" -m venv "$work/env"
"$work/env/bin/pip" install -q cuda-bindings==13.5.0
"$work/env/bin/pip" install -q cuda-python==12.6.2.post1
"$work/env/bin/pip" check
"$work/env/bin/python" - <<'P'
import sys
from importlib import metadata

files = {name: {str(f) for f in metadata.files(name)} for name in ("cuda-bindings", "cuda-python")}
shared = sorted(f for f in files["cuda-bindings"] & files["cuda-python"] if not f.endswith(".pyc"))
print(f"{len(shared)} files are listed by both packages, such as {shared[0] if shared else '-'}")
from cuda.bindings import runtime
there = hasattr(runtime, "cudaLibrary_t")
print(f"cuda.bindings.runtime.cudaLibrary_t: {'there' if there else 'missing'}")
sys.exit(0 if len(shared) == 28 and not there else 1)
P
