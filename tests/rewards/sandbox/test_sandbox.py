"""What a hostile program can do in the sandbox: nothing outside it, and nothing for longer than its limits. Each program
here tries."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from frpo_nemo.errors import ConfigError
from frpo_nemo.rewards.programs.sandbox import MAX_OPEN_FILES, MAX_OUTPUT, MAX_THREADS, ProgramRun, Sandbox

TRY = """
def attempt(name, action):
    try:
        print(name, "succeeded", action())
    except BaseException as problem:
        print(name, "failed", type(problem).__name__)
"""


def run(sandbox: Sandbox, program: str, seconds: float = 10.0, **options) -> ProgramRun:
    """Run a program, and assert that nothing of it is left."""
    result = sandbox.run(TRY + program, seconds, **options)
    wait_until(lambda: not processes_of(sandbox))
    return result


def processes_of(sandbox: Sandbox) -> list[Path]:
    """Return directories in /proc of bubblewrap's and Python's processes: the limit of memory is in their command."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f", {sandbox._memory}, {MAX_THREADS}, ".encode() in command:
            found.append(directory)
    return found


def wait_until(condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return value


def test_a_program_reads_its_input_and_writes_its_output(sandbox):
    assert run(sandbox, "print(int(input()) + 1)", stdin=b"41\n").output == b"42\n"
    assert run(sandbox, "exit(3)").exit_code == 3
    assert run(sandbox, "def broken(:").exit_code == 1
    assert run(sandbox, "print({'a', 'b', 'c'})").output == run(sandbox, "print({'a', 'b', 'c'})").output


def test_there_is_no_network(sandbox):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0frpo-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        port = tcp.getsockname()[1]
        program = f"""
import socket
attempt("local", lambda: socket.create_connection(("127.0.0.1", {port}), 1))
attempt("abroad", lambda: socket.create_connection(("1.1.1.1", 443), 1))
attempt("datagram", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("1.1.1.1", 53)))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
attempt("the hypervisor", lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM))
"""
        socket.create_connection(("127.0.0.1", port)).close()  # it could be reached
        output = run(sandbox, program).output.decode()
    assert output.count("failed") == 5 and "succeeded" not in output, output


def test_neither_the_files_of_the_run_nor_secrets_can_be_read(sandbox, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("the-secret")
    monkeypatch.setenv("HF_TOKEN", "the-secret")
    package = Path(__file__).parents[3] / "frpo_nemo" / "__init__.py"
    files = [tmp_path / "config.yaml", package, "/etc/shadow", "/etc/passwd", "/proc/self/environ", "/proc/1/environ"]
    files += [f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/root/etc/passwd", "/dev/mem", "/sys/kernel/notes"]
    program = f"""
import os
for path in {[str(path) for path in files]}:
    attempt(path, lambda: open(path, "rb").read())
print(dict(os.environ), sorted(os.listdir("/")))
"""
    output = run(sandbox, program).output.decode()
    assert output.count("failed") == len(files) and "succeeded" not in output, output
    assert "the-secret" not in output and "HF_TOKEN" not in output and "'proc'" not in output


def test_installed_packages_are_not_there(sandbox):
    program = """
import os
print(os.listdir(os.path.dirname(os.__file__) + "/site-packages"))
attempt("numpy", lambda: __import__("numpy"))
"""
    assert run(sandbox, program).output == b"[]\nnumpy failed ModuleNotFoundError\n"


def test_nothing_can_be_written(sandbox):
    """This includes memory that looks like files. The program visits every directory, which a cold disk makes slow."""
    program = """
import os
places = [place for place, _, _ in os.walk("/")]
print("places", len(places) > 10, [place for place in places if os.access(place, os.W_OK)])
attempt("file", lambda: open("/here", "w"))
attempt("standard library", lambda: open(os.__file__, "a"))
attempt("mount", lambda: os.chroot("/usr"))
"""
    output = run(sandbox, program, seconds=120.0).output.decode()
    assert "places True []" in output and output.count("failed") == 3, output


@pytest.mark.parametrize(
    "way",
    [
        "os.fork()",
        "[os.fork() for _ in range(10000)]",
        "os.posix_spawn(sys.executable, ['python', '-c', '1'], {})",
        "subprocess.run([sys.executable, '-c', '1'])",
        "subprocess.Popen(['/bin/sh'], start_new_session=True)",
        "multiprocessing.get_context('fork').Process(target=print).start()",
        "multiprocessing.get_context('spawn').Process(target=print).start()",
    ],
)
def test_a_program_is_one_process(sandbox, way):
    result = run(sandbox, f"import multiprocessing, os, subprocess, sys\nattempt('start', lambda: {way})")
    assert b"failed" in result.output, result


def test_a_fork_bomb_ends_at_its_limit(sandbox):
    bomb = """
import os, threading
def burst():
    while True:
        for start in (os.fork, threading.Thread(target=burst).start):
            try:
                start()
            except BaseException:
                pass
burst()
"""
    assert run(sandbox, bomb, seconds=1.0).exit_code in (None, 128 + signal.SIGKILL)


def test_threads_work_and_are_limited(sandbox):
    many = """
import threading
done = threading.Event()
started = 0
try:
    for started in range(10000):
        threading.Thread(target=done.wait, daemon=True).start()
except RuntimeError:
    print(started)
"""
    assert 10 < int(run(sandbox, many).output) < MAX_THREADS
    deep = """
import sys, threading
sys.setrecursionlimit(100000)
threading.stack_size(128 << 20)
def depth(n):
    return n and 1 + depth(n - 1)
thread = threading.Thread(target=lambda: print(depth(50000)))
thread.start()
"""
    assert run(sandbox, deep).output == b"50000\n"


def test_memory_is_limited(sandbox):
    program = """
held = []
try:
    while True:
        held.append(bytearray(8 << 20))
except MemoryError:
    print(len(held) * 8)
"""
    assert 50 < int(run(sandbox, program).output) <= sandbox._memory >> 20


def test_memory_that_the_kernel_holds_for_a_program_is_limited(sandbox):
    """Messages in the queue of a socket that listens, and huge pages that a pipe keeps."""
    program = """
import ctypes, os, socket
def listen():
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("\\0here")
    listening.listen(4096)
attempt("listening", listen)
libc = ctypes.CDLL(None, use_errno=True)
page = ctypes.create_string_buffer(4096)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(page), 4096)
print("vmsplice", libc.vmsplice(os.pipe()[1], vector, 1, 0), ctypes.get_errno())
a, b = socket.socketpair()
a.setblocking(False)
held = 0
try:
    while True:
        held += a.send(b"x" * 65536)
except BlockingIOError:
    print("pair", held < 1 << 20)
"""
    output = run(sandbox, program).output.decode()
    assert output == "listening failed PermissionError\nvmsplice -1 1\npair True\n"


def test_calls_that_pass_by_the_limits_are_refused(sandbox):
    """Numbers of x86_64 and aarch64: memory outside of the process, processes, namespaces, io_uring, tracing."""
    calls = {
        "shmget": (29, 194, 0, 1 << 20, 0o1777),
        "memfd_create": (319, 279, 0, 0),
        "clone": (56, 220, 17, 0, 0, 0, 0),
        "clone into namespaces": (56, 220, 0x10000000, 0, 0, 0, 0),
        "unshare": (272, 97, 0x10000000),
        "io_uring_setup": (425, 425, 1, 0),
        "ptrace": (101, 117, 0, 0, 0, 0),
    }
    program = f"""
import ctypes, platform
libc = ctypes.CDLL(None, use_errno=True)
for name, (x86_64, aarch64, *arguments) in {calls}.items():
    result = libc.syscall(x86_64 if platform.machine() == "x86_64" else aarch64, *arguments)
    print(name, result, ctypes.get_errno())
"""
    assert run(sandbox, program).output.decode().splitlines() == [f"{name} -1 1" for name in calls]


@pytest.mark.parametrize(
    "endless",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import signal\nfor n in set(signal.Signals) - {9, 19}: signal.signal(n, lambda *_: None)\nwhile True: pass",
        "import os; os.closerange(0, 100)\nwhile True: pass",
        # One byte at a time, so that there is always something to read.
        "import fcntl, os\nfcntl.fcntl(1, fcntl.F_SETFL, os.O_DIRECT | os.O_WRONLY)\nwhile True: os.write(1, b' ')",
        "import threading\n[threading.Thread(target=lambda: exec('while True: pass')).start() for _ in range(8)]",
    ],
)
def test_a_program_ends_at_its_time(sandbox, endless):
    start = time.monotonic()
    result = run(sandbox, endless, seconds=0.3)
    assert result.exit_code is None and time.monotonic() - start < 30
    assert 0.3 <= result.seconds < 5


def test_processor_time_files_and_threads_are_limited_and_no_limit_can_be_raised(sandbox):
    program = """
import resource
for name in ("CPU", "AS", "NPROC", "NOFILE", "FSIZE", "CORE"):
    limit = getattr(resource, "RLIMIT_" + name)
    soft, hard = resource.getrlimit(limit)
    print(name, soft, hard)
    attempt("raising", lambda: resource.setrlimit(limit, (hard + 1, hard + 1)))
"""
    lines = run(sandbox, program, seconds=9.5).output.decode().splitlines()
    limits = {"CPU": 10, "AS": sandbox._memory, "NPROC": MAX_THREADS, "NOFILE": MAX_OPEN_FILES, "FSIZE": 0, "CORE": 0}
    assert lines[::2] == [f"{name} {limit} {limit}" for name, limit in limits.items()]
    assert all(line.startswith("raising failed") for line in lines[1::2]), lines


def test_output_is_limited(sandbox):
    result = run(sandbox, "while True: print('x' * 10000)")
    assert result.exit_code is None and MAX_OUTPUT < len(result.output) < MAX_OUTPUT + (1 << 17)


def test_killing_all_that_it_sees_harms_nobody_else(sandbox):
    program = f"""
import os, signal
attempt("everybody", lambda: os.kill(-1, signal.SIGKILL))
attempt("init", lambda: os.kill(1, signal.SIGKILL))
attempt("parent", lambda: os.kill(os.getppid(), signal.SIGKILL))
attempt("the run", lambda: os.kill({os.getpid()}, signal.SIGKILL))
"""
    output = run(sandbox, program).output.decode()
    assert "the run failed ProcessLookupError" in output, output


def test_the_program_has_no_capabilities_and_is_not_root(sandbox):
    running = start(sandbox, "import time; time.sleep(1000)", seconds=1.0)
    fields = wait_until(lambda: next((f for f in map(status, processes_of(sandbox)) if f and confined(f)), None))
    assert {fields[name] for name in ("CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert fields["NoNewPrivs"] == "1"
    assert "0" not in [*fields["Uid"].split(), *fields["Gid"].split(), *fields["Groups"].split()]
    running.join()


def confined(fields: dict[str, str]) -> bool:
    """Return whether a sandbox's process is Python and has dropped its privileges."""
    return fields["Name"].startswith("python") and fields["Seccomp"] == "2" and fields["CapEff"] == "0" * 16


def status(process: Path) -> dict[str, str]:
    try:
        return dict(re.findall(r"(\w+):\t(.*)", (process / "status").read_text()))
    except (FileNotFoundError, ProcessLookupError):
        return {}


def start(sandbox: Sandbox, program: str, seconds: float, results: list | None = None) -> threading.Thread:
    def target():
        try:
            result = sandbox.run(program, seconds)
        except RuntimeError as problem:
            result = problem
        if results is not None:
            results.append(result)

    thread = threading.Thread(target=target)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_for_the_trainer_do_not_end_a_program(sandbox, number):
    """Slurm may send them to every process of a step, and what they end would count as a wrong program."""
    results = []
    thread = start(sandbox, "print(sum(i for i in range(3_000_000)))", 10.0, results)
    for process in wait_until(lambda: processes_of(sandbox)):
        os.kill(int(process.name), number)
    thread.join()
    assert results[0].output == b"4499998500000\n"


def test_a_sandbox_that_is_killed_from_outside_is_an_error(sandbox):
    results = []
    thread = start(sandbox, "import time; time.sleep(1000)", 10.0, results)
    wait_until(lambda: any(confined(f) for f in map(status, processes_of(sandbox)) if f))
    children = [p for p in processes_of(sandbox) if int(status(p)["PPid"]) == os.getpid()]
    os.kill(int(children[0].name), signal.SIGKILL)
    thread.join()
    assert "ended from outside, by signal 9" in str(results[0])
    wait_until(lambda: not processes_of(sandbox))


def test_a_program_does_not_outlive_a_killed_trainer(sandbox):
    code = "import sys; from frpo_nemo.rewards.programs.sandbox import Sandbox\n"
    code += f"Sandbox({sandbox._memory >> 20}).run('while True: pass', 1000.0)"
    trainer = subprocess.Popen([sys.executable, "-c", code])
    wait_until(lambda: any(confined(f) for f in map(status, processes_of(sandbox)) if f))
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not processes_of(sandbox))


def test_a_user_without_rights_has_the_same_sandbox(sandbox):
    """Root in a user namespace has no rights outside it; bubblewrap makes another namespace there."""
    unshare = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us make a user namespace")
    code = """
from frpo_nemo.rewards.programs.sandbox import Sandbox
program = '''
import os, socket
connect = lambda: socket.create_connection(("1.1.1.1", 443), 1)
for attempt in (os.fork, connect, lambda: open("/etc/passwd"), lambda: open("/x", "w")):
    try:
        attempt()
        print("succeeded")
    except OSError:
        print("failed")
'''
print(Sandbox(512).run(program, 10.0).output.decode(), end="")
"""
    result = subprocess.run([*unshare, sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "failed\n" * 4, result


def test_without_a_sandbox_nothing_runs(tmp_path, monkeypatch, sandbox):
    real = Sandbox(256)._bwrap
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no bwrap on the PATH: install the package bubblewrap"):
        Sandbox(256)
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\nexec {real} --no-such-option\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(ConfigError, match="(?s)did not start: .*no-such-option.*needs user namespaces"):
        Sandbox(256)
