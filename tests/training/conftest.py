"""The gradients of tests/megatron/gradient_checks.py are also what whole training steps are compared with, and the models
of tests/planning/known_models.py what experiments are checked with."""

import sys
from pathlib import Path

for neighbour in ("megatron", "planning"):
    sys.path.append(str(Path(__file__).resolve().parents[1] / neighbour))
