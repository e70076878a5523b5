"""Rewards that misbehave, for test_rewards.py; named by path, `faulty.py:function`, so a worker loads them
alone."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time


class Nameless:
    def __str__(self):
        raise RuntimeError("no name")


def score_or_misbehave(prompts, completions, **columns):
    """Acts on each completion; a number is its own score."""
    return [_act(completion) for completion in completions]


def _act(completion):
    if completion == "raise":
        raise ValueError("no such luck")
    if completion == "leave":
        sys.exit(0)
    if completion == "huge":
        return 10**400
    if completion == "nameless":
        return Nameless()
    if completion == "hang":
        time.sleep(1000)
    if completion == "die":
        os._exit(3)
    if completion == "segfault":
        os.kill(os.getpid(), 11)
    if completion == "signal":
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return 6.0
    if completion == "terminate children":
        program = subprocess.Popen(["sleep", "1000"])
        fork = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        fork.start()
        program.terminate(), fork.terminate(), fork.join()
        return float(program.wait() + fork.exitcode)
    known = {"none": None, "text": "good"}
    return known[completion] if completion in known else float(completion)


def short(prompts, completions, **columns):
    return [1.0]


def pid(completions, **columns):
    return [float(os.getpid())] * len(completions)


class Scaled:
    """A reward with state: constructed once with its arguments."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, prompts, completions, **columns):
        return [self.factor * len(c) for c in completions]


class Counted:
    """Counts its constructions in this process."""

    constructed = 0

    def __init__(self):
        Counted.constructed += 1

    def __call__(self, prompts, completions, **columns):
        return [1.0] * len(completions)


def no_columns(prompts, completions):
    return [0.0 for _ in completions]
