"""Log a run's numbers: console, metrics.jsonl, TensorBoard, W&B.

Nothing is reduced here: values are global numbers already. A `step` counts finished optimizer steps, so values logged at
a step belong to the checkpoint of that step.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from pathlib import Path
from typing import Any

from frpo_nemo.records import read_jsonl, write_whole

# (metric, heading, format) that a line on the console shows of a training step, if the run has the metric
COLUMNS = (
    ("loss", "loss", ".4f"),
    ("reward/mean", "reward", ".3f"),
    ("kl/reference", "kl", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("response_length/mean", "length", ".1f"),
    ("gradient_norm", "grad", ".3f"),
    ("learning_rate", "lr", ".1e"),
    ("seconds/step", "seconds", ".2f"),
    ("tokens_per_second", "tokens/s", ".0f"),
)
LINES_PER_RUN = 200  # about; the files have every step
HEADING_EVERY = 20  # lines


class MetricsLogger:
    """Write metrics to run_dir and the console. Only rank 0's is `enabled`; the others do nothing.

    resume_step: the step of the checkpoint that this run continues. Later values of an earlier attempt are dropped, so
    that the files hold the history of the run that survived. None: a new run, which keeps nothing earlier. config: what
    W&B shows as the configuration. WANDB_MODE=offline is respected.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        max_steps: int,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        wandb_name: str | None = None,
        config: dict[str, Any] | None = None,
        enabled: bool = True,
        resume_step: int | None = None,
    ):
        self.sinks: list[Any] = []
        if not enabled:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.sinks.append(JsonLines(run_dir / "metrics.jsonl", resume_step))
        if tensorboard:
            self.sinks.append(_TensorBoard(run_dir / "tensorboard", resume_step))
        if wandb_project:
            self.sinks.append(_Wandb(run_dir, wandb_project, wandb_name, config, resume_step))
        self.sinks.append(_Console(max_steps, resume_step or 0))

    def log(self, step: int, values: dict[str, float], *, kind: str = "") -> None:
        """Record `values` of `step`. Validations and probes have a kind (validation, probe) and are recorded as KIND/NAME.
        Values may be one-element tensors."""
        if not self.sinks:
            return
        prefix = f"{kind}/" if kind else ""
        values = {prefix + name: float(value) for name, value in values.items()}
        for sink in self.sinks:
            sink.log(step, values)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
        self.sinks = []

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class JsonLines:
    """Write one object per line: step, time (seconds since 1970) and the values, null where a number is not finite.
    resume_step: see MetricsLogger."""

    def __init__(self, path: Path, resume_step: int | None):
        last = -1 if resume_step is None else resume_step
        kept = [row for row in read_jsonl(path) if row["step"] <= last] if path.exists() else []
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(path, "a")  # noqa: SIM115 (closed in close)

    def log(self, step: int, values: dict[str, Any]) -> None:
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class _TensorBoard:
    def __init__(self, directory: Path, resume_step: int | None):
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        first = 0 if resume_step is None else resume_step + 1
        self.writer = SummaryWriter(str(directory), purge_step=first, flush_secs=30)

    def log(self, step: int, values: dict[str, float]) -> None:
        # One event for all values: add_scalar writes one for each, which takes milliseconds a step.
        entries = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self.writer.file_writer.add_summary(self.summary(value=entries), step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, project: str, name: str | None, config: dict[str, Any], resume_step: int | None):
        import wandb

        id_file = run_dir / "wandb_id.txt"
        if resume_step is None or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(run_dir),
            id=id_file.read_text(),
            resume="allow",
            # W&B would add the command line, the git remote and the console's text, all of which may contain secrets.
            settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=True),
        )
        # W&B's own step may only grow, but a resumed run repeats steps: use our own metric as the axis.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def close(self) -> None:
        self.run.finish()


class _Console:
    """Show a progress bar with ETA on a terminal; elsewhere only short lines. Prints about LINES_PER_RUN lines or one per
    minute, whichever is more; every validation and probe has its line."""

    def __init__(self, max_steps: int, first_step: int):
        from rich import progress
        from rich.console import Console

        self.max_steps, self.every = max_steps, max(1, max_steps // LINES_PER_RUN)
        self.console = Console(highlight=False)
        self.started, self.first_step = time.monotonic(), first_step
        self.columns: list[tuple[str, str, str]] = []
        self.lines, self.last_line = 0, -math.inf
        self.bar = None
        if self.console.is_terminal:
            self.bar = progress.Progress(
                progress.BarColumn(),
                progress.TextColumn("step"),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("ETA"),
                progress.TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("", total=max_steps, completed=first_step)
            self.bar.start()
            self.console.show_cursor(True)  # a killed run would leave the cursor hidden

    def log(self, step: int, values: dict[str, float]) -> None:
        kinds = {name.partition("/")[0] for name in values}
        if kinds <= {"validation"} or kinds <= {"probe"}:
            self._print_measurement(step, kinds.pop(), values)
            return
        if self.bar:
            self.bar.update(self.task, completed=step)
        now = time.monotonic()
        if step % self.every == 0 or step == self.max_steps or now - self.last_line > 60:
            self.last_line = now
            self._print_step(step, values)

    def _print_step(self, step: int, values: dict[str, float]) -> None:
        columns = [column for column in COLUMNS if column[0] in values]
        if columns != self.columns or self.lines % HEADING_EVERY == 0:
            self.columns = columns
            heading = "".join(f"{title:>9}" for _, title, _ in columns)
            self._print(f"{'step':>6}{heading}" + ("" if self.bar else f"{'ETA':>9}"), style="bold")
        self.lines += 1
        line = "".join(f"{values[name]:>9{form}}" for name, _, form in columns)
        self._print(f"{step:>6}{line}" + ("" if self.bar else f"{self._eta(step):>9}"))

    def _print_measurement(self, step: int, kind: str, values: dict[str, float]) -> None:
        values = {name.removeprefix(f"{kind}/"): value for name, value in values.items()}
        chosen = {name: value for name, value in values.items() if name.endswith("/mean") or name == "kl/exact"}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in (chosen or values).items())
        self._print(f"{step:>6} {kind}: {shown}", style="green")

    def _print(self, text: str, style: str | None = None) -> None:
        # soft_wrap: an output file has no width at which to wrap
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def _eta(self, step: int) -> str:
        done = max(step - self.first_step, 1)
        seconds = round((time.monotonic() - self.started) / done * (self.max_steps - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
