"""Convert a checkpoint of a run or a GGUF file to the Hugging Face format.

    python recipes/convert.py input=runs/first checkpoint=best out=runs/first/hf_best
    python recipes/convert.py input=runs/first/checkpoints/step_00000100 out=runs/first/hf_100 --verify
    python recipes/convert.py input=Qwen2.5-0.5B-Instruct-Q8_0.gguf out=runs/qwen/hf

Options: --help, docs/options.md; --verify is verify=true. Runs in one process on a CPU, which
holds one output shard at a time. A mistake in the options is exit code 2, a failed verification 1.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path


def main() -> None:
    from frpo_nemo.config.cli import from_command_line
    from frpo_nemo.conversion.inputs import ConvertRun, check_conversion
    from frpo_nemo.errors import ConfigError

    sys.argv = ["verify=true" if argument == "--verify" else argument for argument in sys.argv]
    name = Path(sys.argv[0]).name
    try:
        cfg = from_command_line(ConvertRun, "convert")
        conversion = check_conversion(cfg)  # before seconds of imports
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core warns about packages that it does without
            from frpo_nemo.conversion.convert import convert
            from frpo_nemo.conversion.verify import VerificationError
    except ConfigError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        out = convert(cfg, conversion)
    except (ConfigError, VerificationError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    print(f"{out} is complete")


if __name__ == "__main__":
    main()
