"""What a study asks Slurm for, without a cluster: the lines that --dry-run prints. Jobs that run: tests/slurm/test_chain.py."""

from __future__ import annotations

import json
import os
import shlex
import subprocess

import pytest
from tiny_study import tiny_study

from frpo_nemo.errors import ConfigError
from frpo_nemo.study import slurm_chain
from frpo_nemo.study.parts import EvaluationConfig, PartConfig, ServerConfig
from frpo_nemo.study.recipe import ROOT
from frpo_nemo.study.run import ForgettingStudy
from frpo_nemo.study.slurm_chain import SlurmChain


@pytest.fixture
def sbatch_lines(tmp_path, capsys):
    """Return a function from a study's changes to {name of the job: what --dry-run prints for it}"""

    def lines(**changes) -> dict[str, list[str]]:
        study = ForgettingStudy(tiny_study(tmp_path / "out", **changes), lambda recipe, arguments: None)
        SlurmChain(study, ["--config-name", "study/tiny"]).submit(dry_run=True)
        commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
        return {next(w for w in c if w.startswith("--job-name=")).partition("=")[2]: c for c in commands}

    return lines


def dependency(command: list[str]) -> str | None:
    return next((word.partition("=")[2] for word in command if word.startswith("--dependency=")), None)


def submitted(study: ForgettingStudy, *, finished: list[str], silent: list[str] = ()) -> list[str]:
    """Names of the study's jobs, all of them submitted; of those in `finished` (below the seed) there is what they leave, but
    for measurements of those in `silent`."""
    parts = list(study.parts(study.config.seeds))
    names = [str(part.directory.relative_to(study.out)) for part in parts]
    study.out.mkdir()
    lines = [
        dict(name=name, job=str(n), arguments=p.recorded) for n, (name, p) in enumerate(zip(names, parts, strict=True))
    ]
    (study.out / "jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for part in parts:
        own = str(part.directory.relative_to(study.out / "seed_5"))
        if own not in finished:
            continue
        part.directory.mkdir(parents=True)
        (part.directory / "slurm_finished").write_text("1\n")
        if part.stage == "prepare":
            continue
        (part.directory / "config.yaml").write_text("trainer: {max_steps: 1, seed: 5}\n")
        measured = "validation" if part.stage == "train" else "probe"
        records = [{"step": 1, "loss": 1.0}, *([] if own in silent else [{"step": 1, f"{measured}/reward/mean": 0.5}])]
        (part.directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return names


def test_every_part_waits_for_the_one_that_it_needs_and_the_report_for_all(sbatch_lines):
    lines = sbatch_lines(evaluations={"toy": EvaluationConfig(overrides=["benchmarks=[mmlu]"])})
    needs = {name: dependency(command) for name, command in lines.items()}
    report = needs.pop("report")
    assert needs == {
        "seed_5/prepare_0": None,
        **{f"seed_5/{arm}/train": "afterok:<seed_5/prepare_0>" for arm in ("frpo", "impossible")},
        **{f"seed_5/{arm}/alpaca": f"afterok:<seed_5/{arm}/train>" for arm in ("frpo", "impossible")},
        **{
            f"seed_5/{arm}/{run}/eval/toy": f"afterok:<seed_5/{arm}/{run}>"
            for arm in ("frpo", "impossible")
            for run in ("train", "alpaca")
        },
    }
    assert report == "afterany:" + ":".join(f"<{name}>" for name in needs)
    assert lines["report"][-3:] == ["slurm/forgetting.sh", "--config-name", "study/tiny"]


def test_a_part_is_the_job_script_with_the_parts_own_arguments(sbatch_lines, tmp_path):
    train = PartConfig("frpo", "experiment/forgetting_train", ["trainer.max_steps=1"], sbatch=["--nodes=2"])
    tasks = {"own": PartConfig("sft", overrides=["data.train=[]"], script="slurm/sft_70b.sh")}
    lines = sbatch_lines(train=train, tasks=tasks, sbatch=["--partition=a"], arms={"a": ["objective=dr_grpo"]})
    arm = tmp_path / "out/seed_5/a"
    command = lines["seed_5/a/train"]
    assert command[command.index("--partition=a") :] == [
        *["--partition=a", "--nodes=2", "slurm/frpo_7b.sh", "--config-name", "experiment/forgetting_train"],
        *["trainer.max_steps=1", "objective=dr_grpo", f"run_dir={arm}/train"],
        *[f"model.path={tmp_path}/out/seed_5/base", "trainer.seed=5"],
    ]
    command = lines["seed_5/a/own"]
    # sft_70b.sh alone would begin with experiment/sft_70b.
    assert command[command.index("slurm/sft_70b.sh") + 1 :][:3] == ["--config-name", "sft", "data.train=[]"]


def test_servers_are_started_for_the_parts_that_name_them_and_ended_by_the_report(sbatch_lines, tmp_path):
    url = "probe.reward.judge.args.remote.url={out}/servers/judge.url"
    servers = {"judge": ServerConfig("models/judge", ["--runner", "pooling"]), "idle": ServerConfig("models/idle")}
    lines = sbatch_lines(servers=servers, arms={"a": []}, tasks={"t": PartConfig("sft", overrides=[url])}, prepare=[])
    assert list(lines) == ["servers/judge", "seed_5/a/train", "seed_5/a/t", "report"]
    serve = ["slurm/serve.sh", f"{tmp_path}/out/servers/judge.url", "models/judge", "--runner", "pooling"]
    assert lines["servers/judge"][-5:] == serve
    assert dependency(lines["seed_5/a/t"]) == "afterok:<seed_5/a/train>,after:<servers/judge>"
    assert dependency(lines["seed_5/a/train"]) is None
    assert "--end=<servers/judge>" in lines["report"]


def test_what_is_in_the_queue_is_not_submitted_unless_what_it_waits_for_has_failed(tmp_path):
    study = ForgettingStudy(tiny_study(tmp_path / "out"), lambda *_: None)
    prepared, train, later, *_ = study.parts([5])
    parts = [prepared, train, later]
    names = [str(part.directory.relative_to(tmp_path / "out")) for part in parts]
    entries = [dict(name=name, job="1", arguments=part.recorded) for name, part in zip(names, parts, strict=True)]
    prepared.directory.mkdir(parents=True)
    (prepared.directory / "slurm_finished").touch()
    (tmp_path / "out/jobs.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    chain, other = SlurmChain(study, []), ["seed_5/impossible/train", "seed_5/impossible/alpaca", "report"]
    running, waiting = {names[1]: "2"}, {names[2]: "3"}
    assert [job.name for job in chain.missing(running | waiting)] == other
    assert chain.missing(running | waiting)[-1].follows == [*names[1:], *other[:-1]]
    assert [job.name for job in chain.missing(dict(waiting))] == [*names[1:], *other]


def test_what_a_running_job_needed_has_ended_well_though_its_file_is_not_seen_here(tmp_path):
    """Slurm starts it only then; a network file system shows a file of another machine late."""
    study = ForgettingStudy(tiny_study(tmp_path / "out"), lambda *_: None)
    names = submitted(study, finished=[])
    chain, other = SlurmChain(study, []), ["seed_5/impossible/train", "seed_5/impossible/alpaca", "report"]
    later = {names[2]: "3"}
    assert [job.name for job in chain.missing(dict(later), free=set())] == [*names[:3], *other]
    assert [job.name for job in chain.missing(dict(later), free={names[2]})] == other


def test_a_report_that_is_older_than_the_last_rows_is_written_anew(tmp_path):
    """The job that added them died before it came to the page."""
    study = ForgettingStudy(tiny_study(tmp_path / "out", arms={"frpo": []}), lambda *_: None)
    submitted(study, finished=["prepare_0", "frpo/train", "frpo/alpaca"])
    page = tmp_path / "out/report.html"
    page.write_text("alpaca failed")
    os.utime(page, (1, 1))
    assert SlurmChain(study, []).collect() == []
    again = SlurmChain(study, [])
    assert [job.name for job in again.missing({})] == ["report"]
    page.write_text("alpaca finished")
    assert again.missing({}) == []


def test_what_left_nothing_to_report_has_failed_and_the_rest_is_reported(tmp_path):
    study = ForgettingStudy(tiny_study(tmp_path / "out", arms={"frpo": []}), lambda *_: None)
    submitted(study, finished=["prepare_0", "frpo/train", "frpo/alpaca"], silent=["frpo/alpaca"])
    assert [part.title for part in SlurmChain(study, []).collect()] == ["seed 5 frpo alpaca"]
    train, alpaca = study.rows()
    assert (train["status"], alpaca["status"]) == ("finished", "failed")
    assert "has nothing to report: it ran without probe.interval" in alpaca["error"]


def test_a_training_is_checked_for_the_processes_that_its_job_starts(tmp_path):
    """The script and the options of sbatch decide, of which the last counts; a script without sizes gives none."""

    def problem(*sbatch: str, script: str | None = None, layout: str = "trainer.max_steps=2") -> str:
        options = ["trainer.val_interval=2", "data.max_prompt_tokens=8", layout]
        train = PartConfig("frpo", "experiment/forgetting_train", options, script, list(sbatch))
        whole = dict(train=train, arms={"a": ["objective=dr_grpo"]}, sbatch=["--nodes=3"])
        study = ForgettingStudy(tiny_study(tmp_path / "out", **whole), lambda *_: None)
        try:
            SlurmChain(study, []).check()
        except ConfigError as error:
            return str(error)
        return ""

    assert "prompts_per_step=16 leaves some of the 24 vLLM engines" in problem()  # frpo_7b.sh: 8 on a node
    assert "of the 192 vLLM engines" in problem("-N", "24", script="slurm/frpo_70b.sh")
    assert "of the 20 vLLM engines" in problem("--nodes", "5", "--ntasks-per-node=4", "--mem=0")
    assert "trainer.devices=5 is not the number of processes that started, 24" in problem(layout="trainer.devices=5")
    assert problem(script="slurm/serve.sh") == ""  # one process, as the configuration has it


def test_what_ended_well_and_cannot_say_so_has_failed(tmp_path):
    """On a full disk an empty file would stay, which would mean finished."""
    (tmp_path / "slurm_finished").symlink_to("/dev/full")
    command = ["bash", "-c", "source slurm/lib.sh; frpo_finished"]
    job = {"SLURM_JOB_ID": "7", "RUN_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 1 and "slurm_finished cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = subprocess.run(command, cwd=ROOT, env=os.environ | job, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "slurm_finished").read_text() == "7\n"


def test_a_job_script_that_does_not_exist_is_told_before_anything_is_submitted(sbatch_lines):
    with pytest.raises(ConfigError, match=r"seed_5/frpo/train: script=slurm/none\.sh does not exist"):
        sbatch_lines(train=PartConfig(script="slurm/none.sh"))


def test_servers_are_not_for_a_study_on_this_machine(tmp_path):
    study = ForgettingStudy(tiny_study(tmp_path / "out", servers={"judge": ServerConfig("m")}), lambda *_: None)
    with pytest.raises(ConfigError, match=r"only slurm/forgetting\.sh starts servers.*add ~servers"):
        study.run()


def test_what_failed_is_recorded_with_the_last_words_of_its_processes(tmp_path):
    study = ForgettingStudy(tiny_study(tmp_path / "out"), lambda *_: None)
    first, failed, later, *_ = study.parts([5])
    failed.log.parent.mkdir(parents=True)
    failed.log.write_text("0: sft.py: no such thing\nsrun: error: node1: task 0: Exited\n2026 job 7: see above\n")
    first.directory.mkdir()
    (first.directory / "slurm_finished").touch()
    submitted = {"name": "seed_5/prepare_0", "job": "6", "arguments": first.recorded}
    (tmp_path / "out/jobs.jsonl").write_text(json.dumps(submitted) + "\n")
    unfinished = SlurmChain(study, []).collect()
    assert study.finished(first)
    assert [part.title for part in unfinished[:2]] == ["seed 5 frpo train", "seed 5 frpo alpaca"]
    assert [(row["arm"], row["error"]) for row in study.rows()] == [("frpo", "0: sft.py: no such thing")]
    assert not later.log.exists()


def test_a_line_of_submitted_jobs_that_is_cut_is_told(tmp_path):
    """Without it the part would be submitted again while its job is in the queue."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/jobs.jsonl").write_text('{"name": "seed_5/prepare_0", "jo')
    study = ForgettingStudy(tiny_study(tmp_path / "out"), lambda *_: None)
    with pytest.raises(ConfigError, match=r"jobs.jsonl has a line that is cut off or damaged"):
        SlurmChain(study, [])


def test_a_busy_controller_is_asked_again_and_a_refused_job_is_not(tmp_path, monkeypatch):
    """A job that sbatch seemed to refuse may be in the queue: twice the same one must not be."""
    for name in ("squeue", "sbatch"):
        script = (
            f"#!/bin/sh\necho x >>{tmp_path}/{name}.calls\n[ $(wc -l <{tmp_path}/{name}.calls) = 3 ] && echo answer\n"
        )
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_chain, "PAUSE", 0.0)
    assert slurm_chain._slurm("squeue") == "answer\n"
    with pytest.raises(RuntimeError, match="sbatch"):
        slurm_chain._slurm("sbatch", "job.sh")
    assert (tmp_path / "sbatch.calls").read_text() == "x\n"
