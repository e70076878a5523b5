"""Does the reward survive fine-tuning? Train the arms of a study, fine-tune each on something else, write the report.

    python recipes/forgetting.py --config-name study/forgetting        # or: make forgetting
    python recipes/forgetting.py --config-name my_study out=runs/study      # options: --help, docs/options.md

Started again, it continues where it stopped. Exit code 1: some runs failed. out/report.html is the result;
recipes/report.py writes it again. On a Slurm cluster: slurm/forgetting.sh.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    from frpo_nemo.errors import ConfigError
    from frpo_nemo.report.page import print_summary, write_report
    from frpo_nemo.study.parts import check_command, study_of_command_line
    from frpo_nemo.study.run import ForgettingStudy

    try:
        config, config_dir = study_of_command_line(sys.argv[1:])
        study = ForgettingStudy(config, check_command, config_dir)
        study.check()
        rows = study.run()
        page = write_report(rows, study.out)
    except (ConfigError, RuntimeError) as problem:
        sys.exit(f"{Path(sys.argv[0]).name}: {problem}")
    print_summary(rows)
    print(f"report: {page}")
    if any(row["status"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
