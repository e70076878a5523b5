"""Faults in the processes of a job, for tests: PYTHONPATH puts this file before all others, and Python imports it first.

FRPO_FAULTS names a directory of JSON files, one per fault: {"rank": 1, "step": 3, "where": "package.module:Class.method",
"action": "kill", "delay": 0.02}. When that rank calls that function in that step, the action happens `delay` seconds
later, in a thread, while the function goes on. The file becomes NAME.happened just before, so it happens once.
actions: kill (SIGKILL to itself), stop (SIGSTOP), hang (the function never begins), mark (it begins when there is a file
NAME.released: somebody outside does something before). The code under test knows nothing of this.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

PHASES = "frpo_nemo.processes.phases:PhaseTimer.__call__"
current = {"step": 0}


def rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def act(fault: Path, action: str, delay: float) -> None:
    time.sleep(delay)
    fault.rename(fault.with_suffix(".happened"))
    number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(action)
    if number:
        os.kill(os.getpid(), number)


def with_fault(function, fault: Path, plan: dict):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if fault.exists() and current["step"] == plan["step"] and rank() == plan["rank"]:
            if plan["action"] in ("hang", "mark"):
                act(fault, plan["action"], plan["delay"])
                while plan["action"] == "hang" or not fault.with_suffix(".released").exists():
                    time.sleep(0.05)
            else:
                threading.Thread(target=act, args=(fault, plan["action"], plan["delay"]), daemon=True).start()
        return function(*args, **kwargs)

    return wrapped


def noting_step(function):
    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        current["step"] = self.step
        return function(self, *args, **kwargs)

    return wrapped


class Patcher(importlib.abc.MetaPathFinder):
    """Lets others find a module, and wraps functions in it when it has been executed."""

    def __init__(self, wrappers: dict):
        self.wrappers = wrappers  # module -> [(attribute path, wrapper)]

    def find_spec(self, name, path, target=None):
        if name not in self.wrappers:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            for attribute, wrapper in self.wrappers[name]:
                *holders, last = attribute.split(".")
                holder = functools.reduce(getattr, holders, module)
                setattr(holder, last, wrapper(getattr(holder, last)))

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    wrappers: dict[str, list] = {}
    module, _, attribute = PHASES.partition(":")
    wrappers[module] = [(attribute, noting_step)]
    for fault in sorted(Path(os.environ["FRPO_FAULTS"]).glob("*.json")):
        plan = json.loads(fault.read_text())
        module, _, attribute = plan["where"].partition(":")
        wrapper = functools.partial(with_fault, fault=fault, plan=plan)
        wrappers.setdefault(module, []).append((attribute, wrapper))
    sys.meta_path.insert(0, Patcher(wrappers))


if os.environ.get("FRPO_FAULTS"):
    install()
