"""The program of slurm/forgetting.sh: `submit` on a login node, `report` in the last job of the chain.

    python slurm/forgetting.py submit [--dry-run] --config-name study/mine [override ...]

Exit code 2: a wrong configuration, and nothing was submitted. Exit code 1: Slurm refused something; or, for the report,
parts of the study have not finished.
"""

from __future__ import annotations

import os
import sys

from frpo_nemo.errors import ConfigError
from frpo_nemo.report.page import print_summary, write_report
from frpo_nemo.study.parts import check_command, study_of_command_line
from frpo_nemo.study.run import ForgettingStudy
from frpo_nemo.study.slurm_chain import SlurmChain


def main() -> None:
    action, *arguments = sys.argv[1:]
    dry_run = "--dry-run" in arguments
    sys.argv[1:] = arguments = [argument for argument in arguments if argument != "--dry-run"]
    try:
        config, config_dir = study_of_command_line(arguments)
        chain = SlurmChain(ForgettingStudy(config, check_command, config_dir), arguments)
        if action == "report":
            report(chain)
        else:
            submit(chain, dry_run)
    except (ConfigError, RuntimeError) as problem:
        print(f"forgetting.py: {problem}", file=sys.stderr)
        sys.exit(2 if isinstance(problem, ConfigError) else 1)


def submit(chain: SlurmChain, dry_run: bool) -> None:
    if not dry_run and not os.environ.get("FRPO_CONTAINER"):  # its environment may differ
        chain.check()
    submitted = chain.submit(dry_run)
    width = max((len(entry["name"]) for entry in submitted), default=0)
    for entry in submitted:
        after = f"after {', '.join(entry['after'])}" if entry["after"] else "at once"
        print(f"job {entry['job']}  {entry['name']:{width}}  {after}")
    if not submitted and not dry_run:
        print(f"Nothing is left to submit; the report is, or will be, {chain.study.out / 'report.html'}")


def report(chain: SlurmChain) -> None:
    unfinished = chain.collect()
    rows = chain.study.rows()
    page = write_report(rows, chain.study.out)
    print_summary(rows)
    for part in unfinished:
        print(f"not finished: {part.title}, see {part.log}" if part.log.exists() else f"not started: {part.title}")
    print(f"report: {page}")
    if unfinished:
        sys.exit(1)


if __name__ == "__main__":
    main()
