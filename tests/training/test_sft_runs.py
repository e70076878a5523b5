"""Whole runs of recipes/sft.py: repeated exactly, and on a disk that becomes full."""

from __future__ import annotations

import re
import subprocess
import time

import pytest
from runs import Job, assert_same_bits, checkpoints, exported, random_model, steps, validations, without_times

from frpo_nemo.megatron.checkpoint import files as checkpoint_files


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


def test_the_same_seed_gives_the_same_bits_in_supervised_training(model, tmp_path):
    """Compare two runs, one of which validates."""
    overrides = ["--config-name=experiment/demo_sft", f"model.path={model}", "parallel=single", "trainer.max_steps=3"]
    jobs = [
        Job("sft.py", [*overrides, f"trainer.val_interval={interval}"], tmp_path / f"run_{interval}")
        for interval in (0, 3)
    ]
    runs = [job.succeed().run_dir for job in jobs]
    first, second = ([without_times(row) for row in steps(run_dir)] for run_dir in runs)
    assert first == second and len(first) == 3
    assert [[row["step"] for row in validations(run_dir)] for run_dir in runs] == [[], [0, 3]]
    assert_same_bits(exported(runs[0]), exported(runs[1]))


@pytest.fixture
def small_disk(tmp_path):
    """run_dir/checkpoints on a disk of 8 MiB; the rest of run_dir elsewhere."""
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", directory], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a disk to fill cannot be mounted (needs root): {mount.stderr.strip()}")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_is_one_message_and_earlier_checkpoints_stay(model, small_disk):
    run_dir = small_disk.parent
    overrides = ["--config-name=experiment/demo_sft", f"model.path={model}", "parallel=dp2", "trainer.save_interval=2"]
    overrides += ["trainer.val_interval=0", "optim.schedule=constant", "data.sequences_per_step=128"]
    job = Job("sft.py", [*overrides, "trainer.max_steps=5000"], run_dir, ranks=2)
    job.wait_until(lambda: checkpoint_files.newest(run_dir) is not None)
    filler = small_disk / "filler"
    deadline = time.monotonic() + 60
    while job.process.poll() is None and time.monotonic() < deadline:  # deletions of old checkpoints make room again
        fill(filler)
    assert job.wait(1) not in (0, None)
    messages = [line for line in job.output.splitlines() if "CheckpointError: " in line]
    assert messages, job.output[-3000:]
    for message in messages:
        assert re.search(r"step_\d{8} could not be written: No space left on device \(rank \d\)", message), message
    left = [name for name in checkpoints(run_dir) if name != "filler"]
    assert left and all(re.fullmatch(r"step_\d{8}", name) for name in left), left

    filler.unlink()
    newest = int(left[-1].removeprefix("step_"))
    job = Job("sft.py", [*overrides, f"trainer.max_steps={newest + 3}"], run_dir, ranks=2)
    assert f"after step {newest}" in job.succeed().output
    assert [row["step"] for row in steps(run_dir)] == list(range(1, newest + 4))


def fill(file) -> None:
    """Append to `file` until its disk is full."""
    try:
        with file.open("ab", buffering=0) as sink:
            while sink.write(b"\0" * 4096):
                pass
    except OSError:
        time.sleep(0.01)
