"""Hold the groups of ranks of a layout, and the transfers of one rank in them. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parallel:
    """Sizes of the groups, and which ranks they hold: ranks are ordered TP fastest, then CP, DP, PP. Ranks of a stage that
    share experts are neighbours. `first`, `last`: layers of the first and last stage in an uneven split."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    first: int | None = None
    last: int | None = None
    ep: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp

    def stage(self, rank: int) -> int:
        """Return the pipeline stage of `rank`."""
        return rank // (self.tp * self.cp * self.dp)

    def replica(self, rank: int) -> int:
        """Return the data-parallel replica of `rank`."""
        return rank // (self.tp * self.cp) % self.dp

    def ranks(self, rank: int, group: str) -> tuple[int, ...]:
        """Return the global ranks in the group `group` of `rank`: world, tp, pp, cp, dp, dp_cp, embedding (first and
        last stage), ep (that share experts), edp (that have the same experts); for "previous" and "next", the one rank
        there."""
        if group == "world":
            return tuple(range(self.world))
        inner = self.tp * self.cp  # ranks of one stage of one replica
        stage_ranks = inner * self.dp
        same_place = [rank % stage_ranks + stage * stage_ranks for stage in range(self.pp)]
        if group in ("previous", "next"):
            return (same_place[self.stage(rank) + (1 if group == "next" else -1)],)
        if group == "embedding":
            return (same_place[0], same_place[-1])
        if group in ("ep", "edp"):
            stage = range(rank - rank % stage_ranks, rank - rank % stage_ranks + stage_ranks)
            place = divmod(rank, self.ep)[group == "edp"]  # which group of neighbours, or which place in one
            return tuple(r for r in stage if divmod(r, self.ep)[group == "edp"] == place)
        if group == "pp":
            return tuple(same_place)
        if group == "tp":
            first = rank - rank % self.tp
            return tuple(range(first, first + self.tp))
        base = rank - rank % stage_ranks + rank % self.tp
        context = range(self.cp) if group in ("cp", "dp_cp") else [rank // self.tp % self.cp]
        data = range(self.dp) if group in ("dp", "dp_cp") else [self.replica(rank)]
        return tuple(base + inner * d + self.tp * c for d in data for c in context)


@dataclass(frozen=True)
class Transfer:
    """`calls` calls of one kind in one group, with `payload` bytes in all.

    The payload of an all-gather or reduce-scatter is the whole vector, of a gather or scatter one rank's part, of all
    others the tensor. root: this rank is the source of a broadcast or scatter, or the destination of a reduce or gather.
    """

    part: str  # part of the step, in words
    kind: str  # all_reduce, all_gather, reduce_scatter, broadcast, reduce, gather, scatter, all_to_all, send, recv or barrier
    group: str  # a name of Parallel.ranks
    payload: int
    calls: int = 1
    root: bool = False

    def received(self, size: int) -> float:
        """Return the bytes that this rank receives when `size` ranks use ring algorithms (broadcast and reduce: pipelines)."""
        if self.kind == "all_reduce":
            return 2 * (size - 1) / size * self.payload
        if self.kind in ("all_gather", "reduce_scatter", "all_to_all"):
            return (size - 1) / size * self.payload
        if self.kind == "gather":
            return (size - 1) * self.payload if self.root else 0.0
        if self.kind in ("send", "barrier") or size == 1 and self.kind != "recv":
            return 0.0
        return 0.0 if self.root and self.kind in ("broadcast", "scatter") else self.payload
