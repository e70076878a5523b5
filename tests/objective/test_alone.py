"""`frpo_nemo.objective` can be used in other trainers: it needs only torch."""

import json
import subprocess
import sys

USE = """
import json, sys
import torch
before = {name.split(".")[0] for name in sys.modules}
from frpo_nemo.objective import FRPO
advantages = FRPO(lambda_=0.5).effective_advantages(torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.zeros(4, dtype=torch.int64))
after = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(json.dumps({"more": sorted(after - before), "advantages": advantages.tolist()}))
"""


def test_it_imports_nothing_but_torch_and_computes():
    out = json.loads(subprocess.check_output([sys.executable, "-c", USE], text=True))
    assert out["more"] == ["frpo_nemo"]
    first, *others = out["advantages"]
    assert first < 0 < min(others) and abs(first + sum(others)) < 1e-6
