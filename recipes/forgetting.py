"""Does a policy keep what it learned? Train the arms of a study, fine-tune each on something else, write the report.

    python recipes/forgetting.py --config-name study/forgetting        # or: make forgetting
    python recipes/forgetting.py --config-name my_study out=runs/study      # options: configs/forgetting.yaml

Started again, it goes on where it stopped. Exit code 1: some runs failed. out/report.html is the result;
recipes/report.py makes it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path


def check(recipe: str, arguments: list[str]) -> None:
    """Compose what the command would run with; raises ConfigError."""
    from frpo_nemo.objective import build_objective
    from frpo_nemo.training.cli import compose
    from frpo_nemo.training.config import FRPORun, SFTRun
    from frpo_nemo.training.schema import load

    named = arguments[:1] == ["--config-name"]
    name, overrides = (arguments[1], arguments[2:]) if named else (recipe, arguments)
    cfg = load(FRPORun if recipe == "frpo" else SFTRun, compose(name, overrides))
    if recipe == "frpo":
        build_objective(cfg.objective)


def main() -> None:
    from frpo_nemo.errors import ConfigError
    from frpo_nemo.evaluation.forgetting import ForgettingStudy, StudyConfig
    from frpo_nemo.evaluation.report import print_summary, write_report
    from frpo_nemo.training.cli import from_command_line

    try:
        study = ForgettingStudy(from_command_line(StudyConfig, "forgetting"), check)
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
