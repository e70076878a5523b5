"""Every fault of docs/reliability.md, one after another, in one job on the test cluster; prints what was seen.

    python tests/slurm/fault_matrix.py [--experts] [OUT]

Two nodes of two ranks train a small model (TP2 in a node, PP2 between nodes; with --experts a mixture, EP2 in a node and the
router's choices replayed) with a checkpoint at every step. The job
meets a fault in each of steps 2, 3, ...; it continues by requeue, and its weights must at the end be those, bit for
bit, of a job that met none.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "tests" / "slurm")]

import torch  # noqa: E402
from jobs import Cluster, Faults, SlurmJob  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402
from runs import exported, random_model, steps, without_times  # noqa: E402

ENGINE, ACTOR = "frpo_nemo.rollout.engine:RolloutEngine", "frpo_nemo.megatron.actor:PolicyActor"
REWARD, SAVE = "frpo_nemo.examples.toy:toy_reward", "frpo_nemo.megatron.checkpoint.save_load:_write_tensors"
PHASE_TIMEOUT, GRACE = 90, 15  # seconds: trainer.phase_timeout and FRPO_GRACE of the job


@dataclass
class Case:
    """A fault: what Faults.add needs, and what somebody outside does when it has happened."""

    name: str
    where: str
    action: str = "kill"
    rank: int = 1
    delay: float = 0.0
    outside: Callable[[Trial], None] | None = None


@dataclass
class Trial:
    """The job that meets the faults."""

    cluster: Cluster
    job: SlurmJob
    faults: Faults
    disk: Path
    name: str = ""

    def wait_for(self, text: str, log_before: int) -> None:
        self.job.wait_until(lambda: text in self.job.output[log_before:])


def kill_node(number: int, *how: str) -> Callable[[Trial], None]:
    """The job's first node, with ranks 0 and 1 and the batch script, or its second."""

    def kill(trial: Trial) -> None:
        node = trial.cluster.slurm("scontrol", "show", "hostnames", trial.job.show()["NodeList"]).split()[number]
        trial.cluster.cluster("kill-node", node, *how)

    return kill


def time_limit(trial: Trial) -> None:
    """The limit comes to be less than the 300 s of --signal away. The step ends when the signal has come."""
    before = len(trial.job.output)
    trial.cluster.slurm("scontrol", "update", f"JobId={trial.job.number}", "EndTime=now+290")
    trial.wait_for("the time limit is near", before)
    trial.faults.release(trial.name)


def fill_disk(trial: Trial) -> None:
    """Fill the disk of the checkpoints; it is emptied once the run has noticed."""
    before, filler = len(trial.job.output), trial.disk / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=64K"], capture_output=True)
    trial.faults.release(trial.name)
    trial.wait_for("could not be written", before)
    filler.unlink()


CASES = [
    Case("kill -9 in generation", f"{ENGINE}.generate", delay=0.02),
    Case("kill -9 in the reward", REWARD),
    Case("kill -9 in forward/backward", f"{ACTOR}.accumulate_gradient", delay=0.02),
    Case("kill -9 in the optimizer", "frpo_nemo.megatron.optimizer:step"),
    Case("kill -9 in the refit", f"{ENGINE}.refit", delay=0.005),
    Case("kill -9 in the checkpoint", SAVE, delay=0.01),
    Case("kill -9 of rank 0 in forward/backward", f"{ACTOR}.accumulate_gradient", rank=0, delay=0.02),
    Case("SIGSTOP of a rank in forward/backward", f"{ACTOR}.accumulate_gradient", "stop", delay=0.01),
    Case("the reward function hangs", REWARD, "hang"),
    Case("kill of the second node in generation", f"{ENGINE}.generate", "mark", 2, outside=kill_node(1)),
    Case("kill of the first node in generation", f"{ENGINE}.generate", "mark", 0, outside=kill_node(0)),
    Case(
        "a node loses network and power in forward/backward",
        f"{ACTOR}.accumulate_gradient",
        "mark",
        2,
        outside=kill_node(1, "--silent"),
    ),
    Case("time limit", f"{ENGINE}.generate", "mark", 0, outside=time_limit),
    Case("time limit, and the step does not end", f"{ACTOR}.accumulate_gradient", "hang", 0, outside=time_limit),
    Case("the disk is full in the checkpoint", SAVE, "mark", 0, outside=fill_disk),
]


EXPERTS = ["model.sequence_parallel=true", "model.expert_model_parallel_size=2", "rollout.routing_replay=true"]


def overrides(model: str, run_dir: Path, max_steps: int) -> list[str]:
    return [
        "--config-name=experiment/demo",
        f"model.path={model}",
        f"run_dir={run_dir}",
        "parallel=tp2_pp2",
        "rollout.prompts_per_step=16",
        "rollout.group_size=4",
        "rollout.enforce_eager=true",
        f"reward.variety.target={ROOT / 'tests' / 'training' / 'picky_reward.py'}:variety",  # so that each step learns
        f"trainer.max_steps={max_steps}",
        "trainer.val_interval=0",
        "trainer.save_interval=1",
        f"trainer.phase_timeout={PHASE_TIMEOUT}",
        "optim.schedule=constant",
    ]


def meet(trial: Trial, case: Case, step: int) -> tuple[str, str, str]:
    """Wait for one fault and for the restart after it: (seconds until the job was requeued, what the log said, what the
    next start resumed from)."""
    trial.name, before, restarts = f"step_{step}", len(trial.job.output), trial.job.restarts
    trial.job.wait_until(lambda: trial.faults.happened(trial.name))
    started = time.monotonic()
    if case.outside:
        case.outside(trial)
    trial.job.wait_until(lambda: trial.job.restarts > restarts)
    seconds = time.monotonic() - started
    trial.cluster.up()  # a node that was killed is there again
    trial.cluster.slurm("scontrol", "update", f"JobId={trial.job.number}", "TimeLimit=600")
    trial.job.wait_until(lambda: f"restart {restarts + 1} on" in trial.job.output)
    log = trial.job.output[before:]
    patterns = (
        r"watchdog: (.*?); rank \d+ leaves",
        r"could not be written: (.*)",
        r"job \d+: ((?:the|stopped|srun).*)",
        r"(CANCELLED.*DUE TO .*?) \*",
    )
    said = [found[0] for pattern in patterns if (found := re.findall(pattern, log))]
    resumed = re.findall(r"newest checkpoint: (\S+)", log)[-1]
    return f"{seconds:.0f}", "; ".join(said), resumed


def main(out: Path, experts: bool) -> int:
    max_steps, console = len(CASES) + 2, Console(width=200)
    model = random_model(out / "model", **dict(family="qwen3_moe", ffn_hidden_size=64) if experts else {})
    more = EXPERTS if experts else []
    disk = out / "disturbed" / "checkpoints"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-", dir="/var/tmp")), nodes=3)
    cluster.up()
    try:
        plain = cluster.submit(
            "slurm/frpo_7b.sh", *overrides(model, out / "plain", max_steps), *more, log=out / "plain.log"
        )
        plain.succeed(900)
        faults = Faults(out / "faults")
        for step, case in enumerate(CASES, start=2):
            faults.add(
                f"step_{step}", step=step, where=case.where, action=case.action, rank=case.rank, delay=case.delay
            )
        settings = faults.environment | {"FRPO_GRACE": str(GRACE)}
        arguments = [*overrides(model, out / "disturbed", max_steps), *more]
        job = cluster.submit(
            "slurm/frpo_7b.sh", *arguments, log=out / "disturbed.log", options=["--time=600"], **settings
        )
        trial = Trial(cluster, job, faults, disk)
        rows = ["| step | fault | seconds to the requeue | the log says | continued from |", "|---|---|---|---|---|"]
        for step, case in enumerate(CASES, start=2):
            seconds, said, resumed = meet(trial, case, step)
            rows.append(f"| {step} | {case.name} | {seconds} | {said} | {resumed} |")
            console.print(rows[-1], markup=False)
        restarts = job.succeed(900)
    finally:
        cluster.down()
        subprocess.run(["umount", "-l", disk], check=True)
    (out / "table.md").write_text("\n".join(rows) + "\n")
    console.print(Markdown("\n".join(rows)))
    same = same_training(out / "plain", out / "disturbed")
    console.print(
        f"{restarts} restarts; weights and metrics of all {max_steps} steps bitwise those of the undisturbed run: {same}"
    )
    return 0 if same else 1


def same_training(a: Path, b: Path) -> bool:
    """Return whether two runs agree in weights and everything that the steps computed."""
    weights, others = exported(a), exported(b)
    last = {row["step"]: without_times(row) for row in steps(b)}  # a step that was lost is there twice
    return (
        weights.keys() == others.keys()
        and all(torch.equal(weights[n], others[n]) for n in weights)
        and all(last[row["step"]] == without_times(row) for row in steps(a))
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=None)
    parser.add_argument("--experts", action="store_true")
    chosen = parser.parse_args()
    where = chosen.out or Path(tempfile.mkdtemp(prefix="faults-"))
    where.mkdir(parents=True, exist_ok=True)
    sys.exit(main(where.resolve(), chosen.experts))
