"""The command that accepts a machine with GPUs, rehearsed without one."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from acceptance import registry, report, world
from acceptance.context import Context
from acceptance.world import ROOT, Measured
from frpo_nemo.rollout.refit_check import GAP_LIMITS

THRESHOLDS = ROOT / "acceptance" / "thresholds.yaml"
NEED_CUDA = {
    "parity_te",
    "packed_thd",
    "fp8_delayed",
    "fp8_tensorwise",
    "fp8_blockwise",
    "engine_graphs",
    "engine_eager",
    "fp8_delayed_speed",
    "fp8_tensorwise_speed",
    "fp8_blockwise_speed",
    "layout_cp2",
    "layout_tp2_pp2_dp2",
    "layout_tp2_cp2_dp2",
}
H100 = dict(
    cuda=True, device="H100", capability=[9, 0], peak_tflops=989.0, transformer_engine=True, packed_attention=True
)
L4 = H100 | dict(device="L4", capability=[8, 9], peak_tflops=None)
CPU = dict(
    cuda=False, device="CPU", capability=None, peak_tflops=None, transformer_engine=False, packed_attention=False
)


def gpu_check(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "acceptance" / "gpu_check.py"), "--cpu", "--out", str(out), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def lines_of(out: Path) -> dict[str, dict]:
    return {line["check"]: line for line in json.loads((out / "result.json").read_text())["checks"]}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Return (the command's end, what it wrote)."""
    out = tmp_path_factory.mktemp("gpu_check")
    return gpu_check(out), out


def test_every_line_passes_or_needs_cuda(rehearsal):
    ended, out = rehearsal
    lines = lines_of(out)
    assert {name: line["reason"] for name, line in lines.items() if line["status"] == "fail"} == {}, ended.stderr
    assert {name for name, line in lines.items() if line["status"] == "n/a"} == NEED_CUDA
    assert all(lines[name]["reason"].startswith("needs CUDA") for name in NEED_CUDA)
    assert ended.returncode == 0


def test_table_and_json_hold_every_line_in_the_order_of_the_registry(rehearsal):
    ended, out = rehearsal
    names = list(registry.by_name())
    assert list(lines_of(out)) == names
    assert [row.split()[0] for row in (out / "table.txt").read_text().splitlines()[1:]] == names
    assert (out / "table.txt").read_text() in ended.stdout


def test_json_holds_what_was_measured_accepted_and_used(rehearsal):
    _, out = rehearsal
    record = json.loads((out / "result.json").read_text())
    assert {"torch", "megatron-core", "transformers"} <= record["versions"].keys() and record["device"]
    for line in record["checks"]:
        if line["status"] == "pass":
            assert line["thresholds"].keys() <= line["values"].keys(), line
            assert all(math.isfinite(line["values"][name]) for name in line["thresholds"])


def test_gpus_that_are_not_there_are_a_message_and_exit_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "acceptance" / "gpu_check.py"), "--gpus", "99", "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("--gpus 99, but ")
    assert list(tmp_path.iterdir()) == []


def test_a_number_beyond_its_threshold_fails_the_run(tmp_path):
    thresholds = yaml.safe_load(THRESHOLDS.read_text())
    thresholds["parity_fp32"]["logprobs_error"] = {"max": 0}
    (tmp_path / "strict.yaml").write_text(yaml.safe_dump(thresholds))
    ended = gpu_check(tmp_path, "--only", "parity_fp32", "packed_local", "--thresholds", str(tmp_path / "strict.yaml"))
    lines = lines_of(tmp_path)
    assert ended.returncode == 1
    assert [(name, line["status"]) for name, line in lines.items()] == [
        ("parity_fp32", "fail"),
        ("packed_local", "pass"),
    ]
    assert lines["parity_fp32"]["reason"].startswith("logprobs_error is ")
    assert lines["parity_fp32"]["reason"].endswith(" and should be at most 0")
    assert lines["parity_fp32"]["reason"] in ended.stdout


def test_a_check_that_raises_costs_its_own_line_alone(tmp_path):
    """Both find a model that cannot be read, each in processes of its own."""
    group = group_of("numerics", "parity_fp32", "packed_local")
    (tmp_path / "models" / "small").mkdir(parents=True)
    found = world.run_group(group, list(group.checks), cpu=True, work=tmp_path, out=tmp_path)
    assert list(found) == ["parity_fp32", "packed_local"]
    for measured in found.values():
        assert measured.error.startswith("rank 0: ") and measured.error.endswith(f"({tmp_path / 'numerics.log'})")
    assert (tmp_path / "numerics.log").read_text().count("Traceback") == 2


def test_a_group_that_does_not_end_fails_with_its_limit(tmp_path):
    group = replace(group_of("numerics", "parity_fp32", "packed_local"), seconds=2)
    found = world.run_group(group, list(group.checks), cpu=True, work=tmp_path, out=tmp_path)
    assert "had not ended after the 2 s of the group numerics" in found["parity_fp32"].error
    assert found["packed_local"].error == "not run: parity_fp32 used up the 2 s of the group numerics"


def group_of(name: str, *checks: str) -> registry.Group:
    group = next(group for group in registry.GROUPS if group.name == name)
    return replace(group, checks=tuple(check for check in group.checks if check.name in checks))


def test_checks_that_need_cuda_measure_what_they_should_without_it(workers, tmp_path):
    """Their functions are others' with Transformer Engine or FP8 switched on; here they are called without."""
    fp8, speed = workers.run(1, without_cuda, work=str(tmp_path))[0]
    assert fp8["first_logprobs_error"] == fp8["logprobs_error"] == fp8["gradient_error"] == 0
    assert fp8["gradient_cosine"] == pytest.approx(1) and speed["speedup"] > 0


def without_cuda(work: str) -> tuple[dict, dict]:
    from acceptance.checks import fp8, speed

    (Path(work) / "models").mkdir()
    context = Context(Path(work), cuda=False)
    return fp8.against_bf16(context), speed.against_bf16(context)


def test_every_check_has_thresholds_and_every_threshold_a_check():
    thresholds = yaml.safe_load(THRESHOLDS.read_text())
    assert list(thresholds) == list(registry.by_name())
    for name, limits in thresholds.items():
        for limit in limits.values():
            bounds = list(limit.values()) if limit.keys() <= {"cuda", "cpu"} else [limit]
            assert all(bound and bound.keys() <= {"min", "max"} for bound in bounds), name
        assert report.limits_of(thresholds, name, cuda=True), f"{name} accepts anything on a GPU"


def test_names_are_unique_and_every_function_exists():
    checks = [check for group in registry.GROUPS for check in group.checks]
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        module, _, function = check.function.partition(":")
        assert callable(getattr(importlib.import_module(f"acceptance.checks.{module}"), function)), check.name


def test_one_gpu_takes_at_most_ten_minutes():
    assert sum(group.seconds for group in registry.GROUPS if group.ranks == 1) <= registry.ONE_GPU_SECONDS == 600


def test_gaps_are_accepted_up_to_the_limit_at_which_a_run_stops():
    thresholds = yaml.safe_load(THRESHOLDS.read_text())
    gaps = {name: limits["gap"]["max"] for name, limits in thresholds.items() if "gap" in limits}
    assert gaps and set(gaps.values()) == {GAP_LIMITS["bf16"][1]}
    fp8 = {limits["logprobs_error"]["max"] for limits in thresholds.values() if "first_logprobs_error" in limits}
    assert fp8 == {GAP_LIMITS["fp8"][1]}


@pytest.mark.parametrize(
    "name, facts, reason",
    [
        ("resume", CPU | {"ranks": 2}, None),
        ("layout_tp2", CPU | {"ranks": 2}, None),
        ("parity_te", CPU | {"ranks": 2}, "needs CUDA"),
        ("layout_tp2_pp2_dp2", CPU | {"ranks": 2}, "needs CUDA and 8 GPUs"),
        ("fp8_delayed", H100 | {"ranks": 1}, None),
        ("layout_tp2", H100 | {"ranks": 1}, "needs 2 GPUs: --gpus 2"),
        ("layout_tp2_cp2_dp2", H100 | {"ranks": 8}, None),
        ("parity_te", H100 | {"ranks": 1, "transformer_engine": False}, "needs Transformer Engine, which is not installed"),
        ("packed_thd", H100 | {"ranks": 1, "packed_attention": False}, "needs a GPU of compute capability 9.0, or flash-attn"),
        ("fp8_delayed", H100 | {"ranks": 1, "capability": [8, 0]}, "needs a GPU of compute capability 9.0; this one has 8.0"),
        ("mfu", H100 | {"ranks": 1, "capability": [8, 0]}, None),
        ("mfu", CPU | {"ranks": 2}, None),
        ("mfu", L4 | {"ranks": 1}, "needs the peak of L4, which configs/cluster does not have"),
    ],
)  # fmt: skip
def test_what_does_not_apply_is_said_with_what_it_needs(name, facts, reason):
    group, check = next((g, c) for g in registry.GROUPS for c in g.checks if c.name == name)
    assert registry.not_applicable(group, check, facts) == reason


@pytest.mark.parametrize(
    "values, limit, reason",
    [
        ([{"x": 1.0}, {"x": 2.0}], {"max": 2}, ""),
        ([{"x": 1.0}, {"x": 2.5}], {"max": 2}, "x is 2.5 and should be at most 2"),
        ([{"x": 1.0}, {"x": 2.5}], {"min": 2}, "x is 1 and should be at least 2"),
        ([{"x": 3.0}, {"x": math.nan}], {"min": 2}, "x is nan and should be at least 2"),
        ([{"x": 3.0}, {"x": math.nan}], {"max": 4}, "x is nan and should be at most 4"),
        ([{"y": 3.0}, {}], {"max": 4}, "x is not measured and should be at most 4"),
        ([{"x": 3.0}, {}], {"max": 4}, ""),
    ],
)
def test_the_worst_rank_counts(values, limit, reason):
    line = report.judge(registry.by_name()["mfu"], Measured(values), {"x": limit})
    assert (line.status, line.reason) == ("fail" if reason else "pass", reason)
