"""Files that create a file `sprung` next to them when they are unpickled or imported: for tests of trust."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TRAPS = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "trap.py", "modeling_trap.py")


class Trap:
    """Creates `path` when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def set_traps(model: Path) -> None:
    """Into a directory in Hugging Face format: pickled weights beside the safetensors, and code that its configuration
    names for configuration, model and tokenizer."""
    sprung = model / "sprung"
    for name in TRAPS:
        if name.endswith(".py"):
            classes = "".join(f"class {name}:\n    pass\n" for name in ("TrapConfig", "TrapModel", "TrapTokenizer"))
            (model / name).write_text(f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\n{classes}")
        else:
            torch.save(Trap(sprung), model / name)
    _add(model / "config.json", AutoConfig="trap.TrapConfig", AutoModelForCausalLM="modeling_trap.TrapModel")
    _add(model / "tokenizer_config.json", AutoTokenizer=["trap.TrapTokenizer", "trap.TrapTokenizer"])


def _add(file: Path, **auto_map) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto_map}))
