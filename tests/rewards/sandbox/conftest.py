"""Bubblewrap for the tests of the sandbox."""

import os
import shutil
import subprocess

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.programs.sandbox import Sandbox


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """Of a memory limit that tells its processes from those of other sandboxes. Root installs bubblewrap; skipped where
    nobody can, or where the machine does not let us make namespaces."""
    if not shutil.which("bwrap"):
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            pytest.skip("bubblewrap is not installed, and it takes root and apt-get to install it here")
        subprocess.run(["apt-get", "-qq", "update"], check=True)
        subprocess.run(["apt-get", "-qq", "-y", "install", "bubblewrap"], check=True, stdout=subprocess.DEVNULL)
    try:
        return Sandbox(memory_mb=256 + os.getpid() % 256)
    except ConfigError as problem:
        pytest.skip(f"no sandbox on this machine: {problem}")
