"""The end of the demo: evidence that the exported model is the trained one, tables, pictures, and one sentence on how much
reward each arm lost."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from frpo_nemo.report.frame import Results
from frpo_nemo.report.plots import learning_curve, read_metrics
from frpo_nemo.study.results import read_results

NUM_CHECKED = 32  # held-out prompts answered by both libraries


def report(out: Path, seconds: float) -> None:
    """Print and draw what the run under `out`/frpo achieved."""
    run = out / "frpo"
    metrics = read_metrics(run / "metrics.jsonl")
    picture = out / "learning_curve.png"
    learning_curve({"FRPO": run / "metrics.jsonl"}, picture, title="FRPO on the toy task")
    gap = check_export(run)
    table = Table(title="FRPO on the toy task (held-out prompts)")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for label, name in (
        ("reward", "validation/reward/mean"),
        ("  harmful prompts (refuse)", "validation/reward/task/harmful/mean"),
        ("  harmless prompts (help)", "validation/reward/task/harmless/mean"),
        ("KL to the reference, per response", "validation/kl/per_response"),
    ):
        _, values = metrics[name]
        table.add_row(label, f"{values[0]:.3f}", f"{values[-1]:.3f}")
    console = Console(soft_wrap=True)
    console.print(table)
    speed = statistics.median(metrics["tokens_per_second"][1])
    console.print(f"{speed:,.0f} tokens/s in training (median step), {seconds:.0f} s in all", highlight=False)
    print_places(console, run, gap, picture)


def print_places(console: Console, run: Path, gap: float, picture: Path) -> None:
    """Print that the export of `run` loads, with what `check_export` found, and where everything is."""
    console.print(
        f"{run / 'hf'} loads in transformers and in vLLM: {NUM_CHECKED} greedy answers are the same, "
        f"log-probs within {gap:.0e}",
        highlight=False,
    )
    for what, where in (
        ("model", run / "hf"),
        ("checkpoints", run / "checkpoints"),
        ("metrics", run / "metrics.jsonl"),
        ("picture", picture),
    ):
        console.print(f"  {what:12s}{where}", highlight=False)


def report_forgetting(out: Path) -> None:
    """Print what the short study under `out` shows, and where its picture is."""
    console = Console(soft_wrap=True)
    console.print("\n" + forgetting_sentence(Results(read_results(out / "results.jsonl"))), highlight=False)
    for what, where in (("picture", out / "landscape_alpaca.png"), ("report", out / "report.html")):
        console.print(f"  {what:12s}{where}", highlight=False)


def forgetting_sentence(results: Results) -> str:
    """Return the reward on harmful prompts that each arm had and lost in the only task, and why this isn't proof."""
    [task] = results.tasks
    reward = "reward/task/harmful/mean"
    before = results.at_start(reward, "finetune", task)
    after, kl = results.at_end(reward, "finetune", task), results.kl_at_end("train")
    lost = [f"{a} lost {(before - after)[a].mean():.2f} of its {before[a].mean():.2f}" for a in results.arms]
    distances = [f"{arm.mean():.2f} ({name})" for name, arm in kl.items()]
    return (
        f"In harmless fine-tuning, {' and '.join(lost)} reward on harmful prompts; this is one seed, and the two began it "
        f"at different distances from the reference, {' and '.join(distances)} nats: docs/forgetting.md has seven seeds "
        "and matched distances."
    )


def check_export(run: Path, *, max_model_len: int = 64) -> float:
    """Answer held-out prompts greedily with vLLM from the exported files, in float32, and compare with transformers on the
    same tokens; return the largest log-prob difference. max_model_len: of the longest prompt and eight tokens. Raises
    AssertionError when the two are not the same model."""
    from frpo_nemo.processes import world
    from frpo_nemo.rollout.engine import RolloutEngine

    samples = [json.loads(line) for line in sorted((run / "validation").glob("*.jsonl"))[-1].open()][:NUM_CHECKED]
    tokenizer, model = _load_with_transformers(run / "hf")
    prompts = [tokenizer(sample["prompt"], add_special_tokens=False)["input_ids"] for sample in samples]
    world.start_world()
    engine = RolloutEngine(str(run / "hf"), dtype="float32", max_model_len=max_model_len, load_format="auto")
    stop = [tokenizer.eos_token_id]
    greedy = engine.generate(prompts, max_tokens=8, seed=0, stop_token_ids=stop, temperature=0.0)
    sampled = engine.generate(prompts, max_tokens=8, seed=0, stop_token_ids=stop)
    engine.close()
    if dist.is_initialized():
        dist.destroy_process_group()
    gap = 0.0
    for prompt, [best], [drawn] in zip(prompts, greedy, sampled, strict=True):
        expected = _logprobs(model, prompt, best.token_ids)
        assert expected.argmax(1).tolist() == best.token_ids, f"vLLM and transformers answer {prompt} differently"
        own = _logprobs(model, prompt, drawn.token_ids)[range(len(drawn.token_ids)), drawn.token_ids]
        gap = max(gap, (own - torch.tensor(drawn.logprobs)).abs().max().item())
    assert gap < 1e-4, f"log-probs of vLLM and transformers differ by {gap}"
    return gap


def _load_with_transformers(path: Path):
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False), AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    )


@torch.no_grad()
def _logprobs(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """[len(response), vocabulary]"""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)
