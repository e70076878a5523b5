#!/usr/bin/env bash
# Up to torch 2.13 the gradient of torch.clamp with a number as bound is 1 at the bound itself; from 2.14 on it is 0. With a
# tensor as bound it became one half, as torch.minimum has always had it. No warning says so. Where training code clips
# something that often is exactly the bound, its loss keeps its value and loses a gradient: clamp(min=0) of hinge losses and
# margins at 0, a ratio of probabilities that is exactly 1 in an on-policy step and clipped at 1, a log-ratio clipped at 0.
#
# Seen with torch 2.13.0 and 2.14.0 on a CPU, Python 3.11. Source: tools/autograd/derivatives.yaml (clamp), and
# torch/csrc/autograd/FunctionsManual.cpp (clamp_backward).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
cat > "$work/slope.py" <<'P'
import torch

values = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
torch.clamp(values, max=1.0).sum().backward()
of_number = values.grad.tolist()
values.grad = None
torch.clamp(values, max=torch.tensor(1.0)).sum().backward()
print(torch.__version__.partition("+")[0], "gradient of clamp(max=1) at 0, 1, 2:", of_number, "tensor bound:", values.grad.tolist())
P
for version in 2.13.0 2.14.0; do
  "${python:-python3.11}" -m venv "$work/env-$version"
  "$work/env-$version/bin/pip" -q -q --disable-pip-version-check install "torch==$version" numpy
  "$work/env-$version/bin/python" "$work/slope.py" | tee -a "$work/seen"
done
grep -q '2.13.0 .*: \[1.0, 1.0, 0.0\] tensor bound: \[1.0, 1.0, 0.0\]' "$work/seen"
grep -q '2.14.0 .*: \[1.0, 0.0, 0.0\] tensor bound: \[1.0, 0.5, 0.0\]' "$work/seen"
