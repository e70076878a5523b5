"""Runs untrusted Python programs in a bubblewrap (`bwrap`) sandbox. It has no network, no writable file, no /proc, no
environment, and of the file system only Python and the system's libraries. It limits time, memory, threads and output, and
filters system calls to allow one process. Programs never run without it: where there is no sandbox, nothing runs."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.programs import sandbox_child
from frpo_nemo.rewards.programs.seccomp import bpf_filter

STARTUP_SECONDS = 60.0  # for bubblewrap and Python, on a busy machine
MAX_OUTPUT = 4 << 20  # bytes
MAX_THREADS = 64  # the size of large thread pools; kernels before 5.14 count all threads of the user on the machine
MAX_OPEN_FILES = 64
ENVIRONMENT = {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}  # so that a score is reproducible
# A batch system sends these to all processes of a job, and a program that they end would count as wrong.
SIGNALS_FOR_THE_TRAINER = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class ProgramRun:
    """output: what the program wrote to stdout, or its tests' verdicts. exit_code: None when it was killed for exceeding
    its time or output limit, above 128 when a signal ended it. seconds: elapsed, without the start of the sandbox."""

    output: bytes
    exit_code: int | None
    seconds: float


class Sandbox:
    """`run` runs one program at a time in a new sandbox, with memory_mb MiB of address space.

    Raises ConfigError where this machine cannot create a sandbox.
    """

    def __init__(self, memory_mb: int) -> None:
        self._memory = memory_mb << 20
        self._bwrap = shutil.which("bwrap")
        if self._bwrap is None:
            raise ConfigError(
                "programs run in bubblewrap's sandbox, and there is no bwrap on the PATH: install the package bubblewrap "
                "(from Debian, Ubuntu, Fedora, RHEL or conda-forge)"
            )
        try:
            self._check_that_programs_run()
        except RuntimeError as problem:
            raise ConfigError(
                f"{problem}; bubblewrap needs user namespaces (sysctl user.max_user_namespaces, on Ubuntu also "
                "kernel.apparmor_restrict_unprivileged_userns), or root with CAP_SYS_ADMIN"
            ) from problem

    def _check_that_programs_run(self) -> None:
        """Run one that imports modules: their files may exist and be unreadable for nobody. Raises RuntimeError."""
        run = self.run("import random, re\nprint('here')", seconds=10.0)
        if run.output != b"here\n":
            raise RuntimeError(f"a program in the sandbox cannot use Python's standard library below {sys.base_prefix}")

    def run(self, program: str, seconds: float, stdin: bytes = b"", tests: bytes | None = None) -> ProgramRun:
        """Run `program` as a script, or as a module followed by `tests` (see `sandbox_child.run_tests`). It gets at most
        `seconds` of time and, over its threads, of processor time, rounded up; the start of the sandbox does not count.
        Returns for every program; raises RuntimeError when the sandbox did not start or was ended from outside."""
        texts = [stdin, bpf_filter(), program.encode(errors="replace"), *([] if tests is None else [tests])]
        limits = [math.ceil(seconds), self._memory, MAX_THREADS, MAX_OPEN_FILES]
        uid = secrets.randbelow(1 << 30) + (1 << 30) if _is_root() else None  # an unused user: threads count per user
        with _memory_files(texts) as (input_file, seccomp, *files), _blocked(SIGNALS_FOR_THE_TRAINER):
            main = f"{Path(sandbox_child.__file__).read_text()}\nmain({uid}, *{limits}, *{files})"
            process = subprocess.Popen(
                [self._bwrap, *_isolation(), "--seccomp", str(seccomp), "--", _python(), "-BSsP", "-c", main],
                env=ENVIRONMENT,
                stdin=input_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[seccomp, *files],
            )
        return _watch(process, seconds)


def _watch(process: subprocess.Popen, seconds: float) -> ProgramRun:
    output, ended, started = bytearray(), False, None
    deadline = time.monotonic() + STARTUP_SECONDS
    with process.stdout as pipe:  # bubblewrap's own processes hold it too: it closes once the whole sandbox is gone
        # Only the clock ends this: `wait` goes on forever where there is always something to read.
        while (
            not ended
            and len(output) <= MAX_OUTPUT
            and (left := deadline - time.monotonic()) > 0
            and wait([pipe.fileno()], left)
        ):
            chunk = os.read(pipe.fileno(), 1 << 16)
            output += chunk
            ended = not chunk
            if started is None and output.startswith(sandbox_child.READY):
                started = time.monotonic()
                deadline = started + seconds
        stopped = time.monotonic()
        if not ended:
            process.kill()
            while os.read(pipe.fileno(), 1 << 16):
                pass
    exit_code = process.wait()
    if started is None:
        raise RuntimeError(f"the sandbox did not start: {output.decode(errors='replace').strip()[-500:]}")
    if ended and exit_code < 0:
        raise RuntimeError(f"the sandbox was ended from outside, by signal {-exit_code}")
    return ProgramRun(bytes(output.removeprefix(sandbox_child.READY)), exit_code if ended else None, stopped - started)


@functools.cache
def _isolation() -> list[str]:
    """Return bubblewrap's options: what exists inside the sandbox."""
    options = ["--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    options += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try")]
    # As root, mounts need no user namespace, and root in one would have no limit on its threads. Giving up root
    # takes two capabilities, which are lost with it.
    options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if _is_root() else ["--unshare-user"]
    python = Path(_python())
    libraries = [python.parents[1] / "lib", python.parents[1] / "lib64"]
    libraries += [Path(path) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")]
    for path in dict.fromkeys([python, *libraries]):
        if path.is_symlink():
            options += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            options += ["--dir", str(path.parent), "--ro-bind", str(path), str(path)]  # parents are 0700 without --dir
    for packages in sorted({found for path in libraries for found in _package_directories(path.resolve())}):
        options += ["--tmpfs", str(packages), "--remount-ro", str(packages)]  # empty
    options += ["--dir", "/dev"]
    for device in ("/dev/null", "/dev/urandom"):
        options += ["--dev-bind", device, device]
    return [*options, "--remount-ro", "/", "--chdir", "/"]


def _package_directories(libraries: Path) -> Iterator[Path]:
    """Yield the directories of packages next to a Python's standard library."""
    for name in ("site-packages", "dist-packages"):
        yield from libraries.glob(f"python3*/{name}")


def _is_root() -> bool:
    """Return whether this is the machine's root, rather than that of a user namespace, such as a rootless container's."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", str(2**32 - 1)]


def _python() -> str:
    return os.path.realpath(sys.executable)  # in a virtual environment it is a link


@contextlib.contextmanager
def _memory_files(contents: list[bytes]) -> Iterator[list[int]]:
    """Yield a descriptor of an unnamed file for each content, at its beginning, that nobody can change any more."""
    with contextlib.ExitStack() as files:
        fds = []
        for content in contents:
            fds.append(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            file = files.enter_context(open(fds[-1], "wb"))
            file.write(content)
            file.seek(0)
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield fds


@contextlib.contextmanager
def _blocked(signals: Iterable[int]) -> Iterator[None]:
    """Block signals here for a moment, and permanently in processes started meanwhile."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
