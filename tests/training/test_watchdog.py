"""Faults injected into real processes: three ranks on gloo, one of them dies, stops, raises or hangs."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from frpo_nemo.errors import ConfigError
from frpo_nemo.processes.heartbeat import rank_list
from frpo_nemo.processes.watchdog import EXIT_FAILED, EXIT_LOST, EXIT_WRONG, Watchdog

HEARTBEAT = 3.0
PHASE = 4.0
BAD = 1  # the rank that goes wrong, unless the test is about rank 0


def one_rank(rank, world_size, port, run_dir, fault, bad):
    """What every rank runs; its stderr goes to a file. `ready` appears once the fault is about to happen."""
    os.dup2(os.open(f"{run_dir}/stderr_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    phase_timeout = PHASE if fault == "hang" else 60
    with Watchdog(rank, world_size, run_dir, phase_timeout=phase_timeout, heartbeat_timeout=HEARTBEAT) as watchdog:
        watchdog.enter("warm up", 6)
        dist.all_reduce(torch.ones(1))
        watchdog.enter("reward", 7)
        if rank == bad:
            misbehave(fault, run_dir)
        else:
            watchdog.enter("refit", 7)
        if fault != "none":
            dist.all_reduce(torch.ones(1))


def misbehave(fault, run_dir):
    if fault == "raise":
        raise RuntimeError("no such token\nsecond line")
    if fault == "wrong":
        raise ConfigError("model.path=x has changed.")
    if fault == "kill":  # a forked child holds copies of the connections, and must not keep them open
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(10,), daemon=True).start()
    time.sleep(0.3)
    open(f"{run_dir}/ready", "w").close()
    if fault != "none":
        time.sleep(60)


class Job:
    """world_size processes of one_rank. The fork server has torch imported: a rank starts in no time."""

    def __init__(self, run_dir, fault, bad=BAD, world_size=3):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "frpo_nemo.processes.watchdog"])
        self.run_dir = run_dir
        arguments = [(rank, world_size, port, str(run_dir), fault, bad) for rank in range(world_size)]
        self.ranks = [context.Process(target=one_rank, args=a) for a in arguments]
        for process in self.ranks:
            process.start()

    def signal_when_ready(self, rank, number):
        deadline = time.monotonic() + 60
        while not (self.run_dir / "ready").exists():
            assert time.monotonic() < deadline, "the job did not start"
            time.sleep(0.05)
        os.kill(self.ranks[rank].pid, number)

    def exit_codes(self, ranks, within):
        """Exit codes of `ranks`, which must all have ended `within` seconds."""
        start = time.monotonic()
        for rank in ranks:
            self.ranks[rank].join(max(within - (time.monotonic() - start), 0))
            assert self.ranks[rank].exitcode is not None, (
                f"rank {rank} still runs after {within} s: {self.stderr(rank)}"
            )
        print(f"all had left after {time.monotonic() - start:.1f} s")
        return [self.ranks[rank].exitcode for rank in ranks]

    def stderr(self, rank):
        return (self.run_dir / f"stderr_{rank}").read_text()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*args, **kwargs):
        jobs.append(Job(tmp_path, *args, **kwargs))
        return jobs[-1]

    yield start
    for process in jobs[0].ranks if jobs else []:
        process.kill()
        process.join()


def assert_all_name(job, ranks, message):
    for rank in ranks:
        first = job.stderr(rank).split("watchdog: ")[1].split("\n")[0]
        assert message in first.replace(socket.gethostname(), "HOST"), first
        assert f"rank {rank} leaves" in first


def test_killed_rank_takes_the_others_down(job):
    job = job("kill")
    job.signal_when_ready(BAD, signal.SIGKILL)
    assert job.exit_codes([0, 2], within=5) == [EXIT_LOST, EXIT_LOST]
    assert_all_name(job, [0, 2], f'rank 1 (host HOST, pid {job.ranks[1].pid}) died in phase "reward" at step 7')
    assert 'meanwhile ranks 0,2 in "refit" at step 7' in job.stderr(2)
    assert "all_reduce" in (job.run_dir / "stacks" / "rank_2.txt").read_text()


def test_killed_rank_0_takes_the_others_down(job):
    job = job("kill", bad=0)
    job.signal_when_ready(0, signal.SIGKILL)
    assert job.exit_codes([1, 2], within=5) == [EXIT_LOST, EXIT_LOST]
    assert_all_name(job, [1, 2], f'rank 0 (host HOST, pid {job.ranks[0].pid}) died in phase "reward" at step 7')


@pytest.mark.parametrize("bad", [0, 1])
def test_stopped_rank_takes_the_others_down(job, bad):
    job = job("stop", bad=bad)
    job.signal_when_ready(bad, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != bad]
    assert job.exit_codes(others, within=HEARTBEAT + 4) == [EXIT_LOST, EXIT_LOST]
    assert_all_name(job, others, f"rank {bad} (host HOST, pid {job.ranks[bad].pid}) stopped (silent for ")
    assert_all_name(job, others, 'in phase "reward" at step 7')


@pytest.mark.parametrize("bad", [0, 1])
def test_exception_is_named_by_all_and_printed_by_its_rank(job, bad):
    job = job("raise", bad=bad)
    assert job.exit_codes([0, 1, 2], within=20) == [EXIT_FAILED] * 3
    message = f"rank {bad} (host HOST, pid {job.ranks[bad].pid}) failed (RuntimeError: no such token)"
    assert_all_name(job, [0, 1, 2], message + ' in phase "reward" at step 7')
    assert "Traceback" in job.stderr(bad) and "second line" in job.stderr(bad)
    assert "Traceback" not in job.stderr(2)


def test_a_wrong_configuration_ends_all_ranks_as_one(job):
    """The exit code is 2, which slurm/lib.sh expects; the recipe itself turns the bad rank's exception into 2."""
    job = job("wrong")
    assert job.exit_codes([0, 2], within=20) == [EXIT_WRONG] * 2
    assert_all_name(job, [0, 2], "failed (ConfigError: model.path=x has changed.)")


@pytest.mark.parametrize("bad", [0, 1])
def test_hung_phase_ends_the_job_with_stacks_and_names_the_rank_that_the_others_wait_for(job, bad):
    """They hang as well, in a later phase."""
    job = job("hang", bad=bad)
    assert job.exit_codes([0, 1, 2], within=PHASE + 15) == [EXIT_LOST] * 3
    message = f"rank {bad} (host HOST, pid {job.ranks[bad].pid}) hangs (for longer than phase_timeout=4 s)"
    assert_all_name(job, [0, 1, 2], message + ' in phase "reward" at step 7')
    stacks = job.run_dir / "stacks" / f"rank_{bad}.txt"
    assert "in misbehave" in job.stderr(bad) and "in misbehave" in stacks.read_text()


def test_clean_end_at_different_times_is_no_fault(job):
    job = job("none")
    assert job.exit_codes([0, 1, 2], within=20) == [0, 0, 0]
    assert not any(job.stderr(rank) for rank in range(3)) and not (job.run_dir / "stacks").exists()


def test_world_of_one_hung_phase_ends_though_its_stacks_cannot_be_written(job, tmp_path):
    (tmp_path / "stacks").write_text("a file")
    job = job("hang", bad=0, world_size=1)
    assert job.exit_codes([0], within=PHASE + 10) == [EXIT_LOST]
    assert 'hangs (for longer than phase_timeout=4 s) in phase "reward" at step 7' in job.stderr(0)
    assert "in misbehave" in job.stderr(0)


def test_hung_phase_ends_the_job_though_the_console_is_on_a_full_disk(job, tmp_path):
    (tmp_path / "stderr_0").symlink_to("/dev/full")
    job = job("hang", bad=0, world_size=1)
    assert job.exit_codes([0], within=PHASE + 10) == [EXIT_LOST]
    assert "in misbehave" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_connection_refuses_strangers_and_names_missing_ranks(tmp_path):
    store = dist.HashStore()
    errors = []

    def rank_0():
        try:
            Watchdog(0, 3, tmp_path, phase_timeout=9, heartbeat_timeout=0.5, store=store).start()
        except TimeoutError as error:
            errors.append(str(error))

    key = f"frpo_nemo/watchdog/{Watchdog._starts + 1}"
    thread = threading.Thread(target=rank_0)
    thread.start()
    store.wait([key], timedelta(seconds=5))
    with socket.create_connection(("localhost", json.loads(store.get(key))["port"])) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        stranger.settimeout(5)
        assert stranger.recv(100) == b""
    thread.join(10)
    assert errors == ["watchdog: ranks 1-2 did not connect within 1 s"]


def test_ranks_are_written_as_ranges():
    assert rank_list([3]) == "rank 3"
    assert rank_list([0, 1, 2, 5, 7, 8]) == "ranks 0-2,5,7-8"
