"""Print plans as tables and sentences on a terminal. Nothing is computed here."""

from __future__ import annotations

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table

from frpo_nemo.planning.cluster import Cluster
from frpo_nemo.planning.layouts import Candidate, overrides
from frpo_nemo.planning.memory import GIB, Layout, PhaseMemory, readable
from frpo_nemo.planning.timing import Workload

REASONS = 8  # listed


def print_layouts(console: Console, found: list[Candidate], show: int) -> None:
    """Print the best layouts, one row each, at most one row for every combination of TP, PP, EP and vLLM's TP."""
    table = Table(
        box=box.SIMPLE, title=f"{len(found)} layouts fit; the best of each split, best first", title_justify="left"
    )
    names = list(found[0].seconds)
    splits = ["TP", "PP", "DP"] + ["EP"] * any(candidate.layout.ep > 1 for candidate in found)
    for column in (*splits, "vLLM TP", "tokens", "recompute", "peak GiB", "in", *names, "step s"):
        table.add_column(column, justify="right")
    best: dict[tuple, Candidate] = {}
    for candidate in found:
        layout = candidate.layout
        best.setdefault((layout.tp, layout.pp, layout.ep, layout.engine.tp), candidate)
    for candidate in list(best.values())[:show]:
        layout = candidate.layout
        worst = max(candidate.phases, key=lambda phase: phase.total)
        table.add_row(
            *(str(getattr(layout, name.lower())) for name in splits),
            *map(str, (layout.engine.tp, layout.microbatch_tokens, layout.recompute)),
            f"{candidate.peak / GIB:.1f}",
            worst.name,
            *(f"{candidate.seconds[name]:.1f}" for name in names),
            f"{candidate.step:.1f}",
        )
    console.print(table)


def memory_table(phases: list[PhaseMemory], title: str) -> Table:
    """Return a table of parts by phase, for the pipeline stage that needs most."""
    table = Table("GiB", box=box.SIMPLE, title=title, title_justify="left")
    for phase in phases:
        table.add_column(f"{phase.name} (stage {phase.stage})", justify="right")
    for part in dict.fromkeys(name for phase in phases for name in phase.parts):
        row = (f"{phase.parts[part] / GIB:.1f}" if part in phase.parts else "" for phase in phases)
        table.add_row(part, *row)
    table.add_row("together", *(f"{phase.total / GIB:.1f}" for phase in phases), style="bold")
    return table


def print_choice(console: Console, choice: Candidate, cluster: Cluster, work: Workload) -> None:
    """Print memory and seconds of the chosen layout, the options that choose it, and those for which it was chosen."""
    title = f"{choice.layout}: memory of a GPU, which has {cluster.gpu_memory_gib:g} GiB"
    console.print(memory_table(choice.phases, title))
    spent = ", ".join(f"{name} {value:.1f} s" for name, value in choice.seconds.items())
    console.print(f"Estimated step of {choice.step:.0f} s: {spent}.")
    console.print("Choose it with:")
    console.print(overrides(choice.layout, cluster, work), soft_wrap=True, highlight=False, markup=False)


def print_rejected(console: Console, rejected: Counter[str]) -> None:
    """Print why others do not fit, the most frequent reasons first."""
    if rejected:
        console.print(f"\n{sum(rejected.values())} others do not fit:")
    for reason, count in rejected.most_common(REASONS):
        console.print(f"  {count:5d}  {reason}", highlight=False, markup=False)
    if len(rejected) > REASONS:
        listed = sum(count for _, count in rejected.most_common(REASONS))
        console.print(f"  {sum(rejected.values()) - listed:5d}  other reasons")


def print_dry_run(layout: Layout, stages: list) -> None:
    """Print what dry_run.py built, one row per pipeline stage."""
    table = Table("stage", "layers", "parameters of a rank", "GiB", "by the arithmetic", title=f"{layout}: built")
    for stage in stages:
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}"
        size, same = f"{stage.bytes / GIB:.3f}", "equal" if stage.bytes == stage.estimate else "different"
        table.add_row(str(stage.number), layers, f"{stage.parameters:,}", size, same)
    console = Console()
    console.print(table)
    console.print("Names and shapes: as in the table of weights and in transformers' model.", highlight=False)


def summary(layout: Layout, phases: list[PhaseMemory], limit: int, where: str) -> str:
    """Return the plan of a run: its layout, the expected peak, and the memory of each phase by part."""
    worst = max(phases, key=lambda phase: phase.total)
    lines = [
        f"plan: {layout}, {layout.precision}, microbatches of {layout.microbatch_tokens} tokens, "
        f"recompute={layout.recompute}; expected peak of each {where}: {readable(worst.total)} of {readable(limit)}"
    ]
    for phase in phases:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in phase.parts.items() if size)
        lines.append(f"  {phase.name:10} {readable(phase.total)}: {parts}")
    return "\n".join(lines)
