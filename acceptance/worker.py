"""One rank of one group: `python -m acceptance.worker GROUP`. world.py starts it and reads what it writes.

A check that raises ends the process at once: other ranks may wait for this one, and CUDA may not work any more.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from acceptance import registry
from acceptance.context import Context


def main() -> None:
    options = _options()
    faulthandler.dump_traceback_later(options.seconds)  # where a rank hangs, for the log
    group = next(group for group in registry.GROUPS if group.name == options.group)
    context = Context(options.work, cuda=not options.cpu)
    with options.results.open("w", buffering=1) as results:

        def say(**record) -> None:
            results.write(json.dumps(record) + "\n")

        for check in group.checks:
            if check.name in options.checks:
                _run(check, group.world, context, say)
        context.closing.close()
        _stop_world()
        # A second vLLM, which no run has, may be left. The recipe check covers how a run ends.
        sys.stdout.flush()
        os._exit(0)


def _run(check: registry.Check, in_world: bool, context: Context, say) -> None:
    module, _, function = check.function.partition(":")
    started = time.monotonic()
    try:
        if in_world:
            _start_world()
        values = getattr(importlib.import_module(f"acceptance.checks.{module}"), function)(context)
    except BaseException as error:
        traceback.print_exc()
        say(check=check.name, error=f"{type(error).__name__}: {error}", seconds=time.monotonic() - started)
        sys.stderr.flush()
        os._exit(1)
    say(check=check.name, values=values, seconds=time.monotonic() - started)


@functools.cache
def _start_world() -> None:
    from frpo_nemo.processes import world
    from frpo_nemo.training.run import ignore_warnings_of_libraries

    ignore_warnings_of_libraries()
    world.start_world()


def _stop_world() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("group")
    parser.add_argument("--checks", nargs="+", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, of this rank")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--cpu", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
