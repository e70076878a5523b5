"""What the preflight concludes from the reports of the nodes: pure arithmetic on files, as the nodes write them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "preflight.py"
NODES = ["n1", "n2", "n3", "n4"]


@pytest.fixture(scope="module")
def preflight():
    spec = importlib.util.spec_from_file_location("preflight", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reports(tmp_path):
    """Return the reports of four healthy nodes of two ranks, {file name: content}, for tests to change and write."""
    versions = {"python": "3.11.7", "torch": "2.13.0", "driver": "570.1"}
    files = {}
    for name in NODES:
        others = sorted(NODES)
        files[f"{name}.here"] = {"gpus": 8, "gpus_wanted": 8, "busy_gpus": [], "versions": dict(versions)}
        files[f"{name}.seen"] = {"seen": others, "reached": others}
        for local in range(2):
            files[f"{name}.rank{NODES.index(name) * 2 + local:05d}"] = {"stage": 3, "gb_per_second": 100.0}
    return files


@pytest.fixture
def judge(preflight, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FRPO_HOSTS", ",".join(NODES))
    monkeypatch.setenv("FRPO_RANKS_PER_NODE", "2")

    def judge(files, of="nodes") -> tuple[int, str, str]:
        for name, content in files.items():
            preflight.write(tmp_path / name, content)
        code = {"nodes": preflight.judge_nodes, "ranks": preflight.judge_ranks}[of](tmp_path)
        return code, (tmp_path / "bad_nodes").read_text(), capsys.readouterr().out

    return judge


def test_healthy_nodes_pass_and_none_is_named(judge, reports):
    code, bad, text = judge(reports, of="ranks")
    assert (code, bad) == (0, "")
    assert "4 nodes and 8 ranks are well" in text


def test_a_node_without_a_report_is_named(judge, reports):
    del reports["n3.here"], reports["n3.seen"]
    code, bad, text = judge(reports)
    assert (code, bad) == (1, "n3")
    assert "n3: no report" in text


def test_a_node_with_another_version_than_most_is_named(judge, reports):
    reports["n2.here"]["versions"]["torch"] = "2.12.0"
    _, bad, text = judge(reports)
    assert bad == "n2"
    assert "n2: has torch 2.12.0, others have 2.13.0" in text


def test_where_versions_are_split_evenly_nobody_is_excluded(judge, reports):
    for name in ("n1", "n2"):
        reports[f"{name}.here"]["versions"]["torch"] = "2.12.0"
    code, bad, text = judge(reports)
    assert (code, bad) == (1, "")
    assert "n1: has torch 2.12.0, others differ" in text


def test_where_most_reports_are_missing_nobody_is_excluded(judge, reports):
    """The node that judges may be the one that does not share the disk."""
    for name in ("n2", "n3", "n4"):
        del reports[f"{name}.here"], reports[f"{name}.seen"]
    code, bad, _ = judge(reports)
    assert (code, bad) == (1, "")


def test_ranks_that_never_started_fail_the_preflight(judge, reports):
    nodes_only = {name: content for name, content in reports.items() if ".rank" not in name}
    code, bad, text = judge(nodes_only, of="ranks")
    assert (code, bad) == (1, "")
    assert "on all nodes alike, ranks did not all start" in text


def test_a_report_that_is_being_written_is_not_read(preflight, tmp_path):
    (tmp_path / "n1.here.tmp").write_text('{"half')
    (tmp_path / "n1.rank00000.tmp").write_text('{"half')
    assert preflight.read(tmp_path, ".here") == {} and preflight.rank_reports(tmp_path) == []


def test_a_node_that_lacks_a_package_is_named(judge, reports):
    del reports["n4.here"]["versions"]["driver"]
    assert judge(reports)[1] == "n4"


def test_a_missing_gpu_and_one_that_is_in_use_are_named(judge, reports):
    reports["n1.here"]["gpus"] = 7
    reports["n4.here"]["busy_gpus"] = ["3"]
    _, bad, text = judge(reports)
    assert bad == "n1,n4"
    assert "n1: shows 7 GPUs, 8 were asked for" in text
    assert "n4: GPU 3 holds more than 2 GiB" in text


def test_one_node_that_nobody_reaches_is_named_alone(judge, reports):
    for name in NODES:
        reached = [] if name == "n2" else [other for other in NODES if other != "n2"]
        reports[f"{name}.seen"]["reached"] = reached
    _, bad, text = judge(reports)
    assert bad == "n2"
    assert "n2: no TCP connection" in text


def test_ranks_that_came_less_far_than_others_name_their_node(judge, reports):
    for name in NODES:
        for file in (f for f in reports if f.startswith(f"{name}.rank")):
            reports[file]["stage"] = 1 if name == "n4" else 2
    _, bad, text = judge(reports, of="ranks")
    assert bad == "n4"
    assert "n4: its ranks met the others, others reduced in its node" in text


def test_where_all_came_equally_far_the_job_fails_and_no_node_is_named(judge, reports):
    for file in (f for f in reports if ".rank" in f):
        reports[file]["stage"] = 2
    code, bad, text = judge(reports, of="ranks")
    assert (code, bad) == (1, "")
    assert "no node to name" in text


def test_where_all_nodes_are_bad_none_is_excluded(judge, reports):
    """Others would do no better, and the job could never start again."""
    for name in NODES:
        reports[f"{name}.here"]["gpus"] = 0
    code, bad, _ = judge(reports)
    assert (code, bad) == (1, "")
