"""The gradients of tests/megatron/gradient_checks.py are also what whole training steps are compared with."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "megatron"))
