"""The cluster of tests/slurm: one for the session, started when first needed."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from jobs import Cluster


@pytest.fixture(scope="session")
def cluster():
    """Three nodes, so that a job on two can leave one. Skipped where the machine does not let us make namespaces; any
    other trouble is an error."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on this machine needs root")
    namespaces = subprocess.run(
        ["unshare", "--net", "--pid", "--uts", "--mount", "--fork", "true"], capture_output=True
    )
    if namespaces.returncode:
        pytest.skip(f"no namespaces for a Slurm cluster: {namespaces.stderr.decode().strip()}")
    if not shutil.which("apt-get") and not shutil.which("slurmctld"):
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp"))  # short: sockets live there
    cluster = Cluster(directory, nodes=3)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
