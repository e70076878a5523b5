#!/usr/bin/env bash
# One all-gather of a tensor above 32,768 elements over gloo, also in a group of one rank, makes small parallel operations of the
# whole process 5 to 9 times slower, for as long as it lives. gloo's thread copies the tensor with OpenMP, and libgomp starts a
# team of its own for that thread. The process then has more OpenMP threads than cores, so libgomp lets all of them wait
# for 100 instead of 300,000 rounds before they sleep, at every barrier. On two cores torch.mul of 131,072 numbers took 9 us
# before and 70 us after. Gradients of DDP and of distributed optimizers are gathered so, and a sampler in the same process
# (colocated rollouts on a CPU) takes twice as long after the first update. all_reduce and broadcast do not do it. If each
# gloo thread does its first large copy while torch.set_num_threads(1) holds, it copies alone forever, and nothing slows down.
#
# Seen with torch 2.13.0 and 2.14.0, gloo, OMP_NUM_THREADS equal to the cores, Python 3.11, Linux x86-64.
# Sources: torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (copies of gathered tensors), libgomp's env.c
# (gomp_throttled_spin_count_var), aten/src/ATen/ParallelOpenMP.cpp (lazy_init_num_threads).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cores=$(nproc)
[ "$cores" -gt 1 ] || { echo "one core: no team to start"; exit 2; }
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
cat > "$work/slow.py" <<'P'
import sys
import time
import warnings

import torch
import torch.distributed as dist

warnings.simplefilter("ignore")


def microseconds() -> float:
    numbers = torch.randn(1 << 17)
    for repetition in range(2):
        start = time.perf_counter()
        for _ in range(2000):
            numbers.mul(2)
    return (time.perf_counter() - start) / 2000 * 1e6


def gather() -> None:
    works = [dist.all_gather_into_tensor(torch.zeros(1 << 20), torch.zeros(1 << 20), async_op=True) for _ in range(8)]
    for work in works:
        work.wait()


dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
threads = torch.get_num_threads()
before = microseconds()
if sys.argv[1] == "alone":
    torch.set_num_threads(1)
    gather()
    torch.set_num_threads(threads)
else:
    dist.all_reduce(torch.zeros(1 << 20))
after_reduce = microseconds()
gather()
after = microseconds()
print(f"{torch.__version__.partition('+')[0]} {sys.argv[1]}: {before:.1f} us, then {after_reduce:.1f}, after a gather {after:.1f}")
slower = after / before
sys.exit(not (slower > 2.5 if sys.argv[1] == "team" else slower < 2) or after_reduce / before > 2)
P
for version in 2.13.0 2.14.0; do
  "${python:-python3.11}" -m venv "$work/env-$version"
  "$work/env-$version/bin/pip" -q -q --disable-pip-version-check install "torch==$version" numpy
  for how in team alone; do
    OMP_NUM_THREADS=$cores "$work/env-$version/bin/python" "$work/slow.py" "$how" "$work/$version-$how"
  done
done
