"""Communication of a step: formulas equal what is counted on real process groups; a refit's traffic and memory."""

import pickle

import communication_checks
import pytest
from tiny_models import make_tiny

from frpo_nemo.planning.communication import Parallel, Transfer

LAYOUTS = {
    "DP2": dict(world=2, family="llama"),
    "TP2": dict(world=2, family="qwen3", tp=2),
    "TP2 with sequence parallelism, recomputed": dict(world=2, family="qwen3", tp=2, sp=True, recompute="full"),
    "PP2": dict(world=2, family="llama", pp=2),
    "TP4, more ranks than query groups": dict(world=4, family="llama", tp=4, sp=True),
    "TP2 PP2, tied embedding": dict(world=4, family="qwen3", tp=2, pp=2, sp=True),
    "TP2 PP2 in bf16": dict(world=4, family="qwen3", tp=2, pp=2, sp=True, precision="bf16"),
    "TP2 DP2": dict(world=4, family="llama", tp=2, sp=True),
    "adapters, TP2 PP2 with sequence parallelism": dict(world=4, family="qwen3", tp=2, pp=2, sp=True, lora_rank=4),
    "adapters, TP2 DP2, recomputed": dict(world=4, family="llama", tp=2, sp=True, recompute="full", lora_rank=4),
}
BUCKET = 1 << 18  # bytes: several buckets, and one tiny weight (fc1, 192 KiB) fits


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return family -> a tiny model; qwen3 has norms of queries and keys, and here a tied embedding."""
    directory = tmp_path_factory.mktemp("models")
    return {
        family: make_tiny(directory / family, family, layers=2, tied=family == "qwen3") for family in ("llama", "qwen3")
    }


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_calls_and_bytes_of_every_phase_are_those_of_the_formulas(workers, models, tmp_path, layout):
    arguments = {key: value for key, value in layout.items() if key not in ("world", "family")}
    ranks = workers.run(
        layout["world"],
        communication_checks.counted_and_computed,
        path=models[layout["family"]],
        directory=str(tmp_path),
        **arguments,
    )
    differences = [line for phases in ranks for phase in phases.values() for line in phase.differences]
    assert not differences, "\n".join(differences)
    for phases in ranks:
        assert all(phase.calls > 0 for phase in phases.values()), phases


def test_no_way_to_communicate_escapes_the_count(workers):
    for counted, told in workers.run(2, communication_checks.counted_ways_to_communicate):
        assert sum(calls for calls, _ in counted.values()) == told
        assert counted == {
            "all_reduce": [3, 16 + 16 + (16 + 32)],
            "all_gather": [5, 3 * 32 + 2 * (8 + _pickled("x"))],
            "reduce_scatter": [1, 32],
            "broadcast": [3, 16 + 8 + _pickled("x")],
            "reduce": [1, 16],
            "all_to_all": [1, 32],
            "send": [1, 16],
            "recv": [1, 16],
            "barrier": [1, 0],
        }


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2), dict(tp=2, pp=2)], ids=["TP2", "PP2", "TP2 PP2"])
def test_a_refit_brings_each_byte_that_a_rank_lacks_once(workers, tmp_path, layout):
    path = make_tiny(tmp_path / "model", "qwen3", layers=2, vocab=128)  # no padding
    world = layout.get("tp", 1) * layout.get("pp", 1)
    for traffic in workers.run(world, communication_checks.refit_traffic, path=path, bucket_bytes=BUCKET, **layout):
        # Replicated weights come from one rank of the tensor group, so that all have the same bits: once, if at all.
        assert traffic["missing"] <= traffic["received"] <= traffic["missing"] + traffic["replicated"]
        assert traffic["received"] <= traffic["whole"]


@pytest.mark.parametrize("layout", [dict(tp=2), dict(pp=2)], ids=["TP2", "PP2"])
def test_a_refit_holds_a_bucket_whatever_the_size_of_the_model(workers, tmp_path, layout):
    for layers in (2, 8):
        path = make_tiny(tmp_path / f"{layers}", "llama", layers=layers)
        for peak, weight, tensor, whole in workers.run(
            2, communication_checks.refit_memory, path=path, bucket_bytes=BUCKET, **layout
        ):
            assert weight <= BUCKET
            # The bucket, and this rank's part of it or a tensor that is put together; as much for each of the group's
            # two gloo threads, which let go of a finished call when they run next; the tensor that the caller has.
            assert peak <= 3 * (BUCKET + max(BUCKET / layout.get("tp", 1), tensor)) + tensor
            assert layers == 2 or whole > 8 * BUCKET > peak


def test_groups_hold_the_ranks_that_megatron_gives_them():
    parallel = Parallel(tp=2, cp=2, dp=2, pp=2)
    assert parallel.ranks(13, "tp") == (12, 13)
    assert parallel.ranks(13, "cp") == (13, 15)
    assert parallel.ranks(13, "dp") == (9, 13)
    assert parallel.ranks(13, "dp_cp") == (9, 11, 13, 15)
    assert parallel.ranks(13, "pp") == parallel.ranks(13, "embedding") == (5, 13)
    assert parallel.ranks(13, "previous") == (5,) and parallel.ranks(5, "next") == (13,)


def test_received_bytes_are_those_of_the_ring_algorithms():
    assert Transfer("", "all_reduce", "dp", 800).received(4) == 1200
    assert Transfer("", "all_gather", "dp", 800).received(4) == 600
    assert Transfer("", "broadcast", "pp", 800).received(4) == 800
    assert Transfer("", "broadcast", "pp", 800, root=True).received(4) == 0
    assert Transfer("", "recv", "next", 800).received(1) == 800
    assert Transfer("", "all_reduce", "dp", 800).received(1) == 0


def _pickled(value) -> int:
    return len(pickle.dumps(value))
