#!/usr/bin/env bash
# On a processor with bf16 instructions, torch's bf16 matrix products are oneDNN's, which compiles a kernel for every new
# number of rows: 1 to 2 ms, ten times the product of a small layer, and .5 to .7 MiB of memory that its cache keeps, up to
# 1,024 kernels. fp32 products are MKL's and have neither. Batches of language models are ragged, so every microbatch, every
# expert of a mixture and every decoding step has another number of rows: 300 of them in two products held 400 MiB, and a
# update of a mixture spent a third of its time on compiling. Rounding rows up to a multiple of 32 avoids both.
#
# Seen with torch 2.13.0 on Linux x86-64 (AMX), Python 3.11. Sources: aten/src/ATen/native/mkldnn/Matmul.cpp, oneDNN's
# documentation of its primitive cache (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -q -m1 -e avx512_bf16 -e amx_bf16 /proc/cpuinfo || { echo "this processor has no bf16 instructions: not comparable"; exit 2; }
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q -q --disable-pip-version-check install torch==2.13.0 numpy
cat > "$work/products.py" <<'P'
import sys
import time

import torch

torch.set_num_threads(1)


def resident() -> float:
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20


def milliseconds(rows: list[int], x, y, weight) -> float:
    start = time.perf_counter()
    for n in rows:
        x[:n] @ weight.t()
        y[:n].t() @ x[:n]
    return (time.perf_counter() - start) / len(rows) / 2 * 1e3


seen = {}
for dtype in (torch.float32, torch.bfloat16):
    x, y, weight = (torch.randn(size, dtype=dtype) for size in ((1024, 128), (1024, 256), (256, 128)))
    milliseconds([400] * 20, x, y, weight)
    before, ragged = resident(), list(range(401, 701))
    first = milliseconds(ragged, x, y, weight)
    held = resident() - before
    again = milliseconds(ragged, x, y, weight)
    seen[dtype] = (first / again, held)
    print(f"{dtype}: {first:.2f} ms a product of a new number of rows, {again:.2f} of one seen before; {held:.0f} MiB held")
sys.exit(not (seen[torch.bfloat16][0] > 3 and seen[torch.bfloat16][1] > 100 and seen[torch.float32][0] < 2))
P
"$work/env/bin/python" "$work/products.py"
