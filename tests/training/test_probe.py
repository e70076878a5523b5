"""Probes during supervised fine-tuning: they measure what their names say, and do not affect the training."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest
import torch
from runs import Job, exported, probes, random_model, steps, validations, without_times
from transformers import AutoModelForCausalLM, AutoTokenizer

from frpo_nemo.examples.toy import rows, toy_reward

STEPS, PROMPTS, SAMPLES, HELD_OUT = 25, 32, 2, 24
PROBE = ["probe.interval=10", f"probe.prompts.0.limit={PROMPTS}", f"probe.samples={SAMPLES}"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return random_model(tmp_path_factory.mktemp("model") / "base")


def overrides(model: str) -> list[str]:
    sizes = [f"trainer.max_steps={STEPS}", "trainer.val_interval=10", f"data.validation.0.limit={HELD_OUT}"]
    return ["--config-name=experiment/forgetting_alpaca", f"model.path={model}", "optim.lr=3e-3", *sizes]


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    """Return (the run directory of a fine-tuning with probes, killed between two of them and continued; that of one without)"""
    directory = tmp_path_factory.mktemp("both")
    unprobed = Job("sft.py", [*overrides(model), "probe.interval=0", "probe.prompts=[]"], directory / "unprobed")
    command = [*overrides(model), *PROBE, "trainer.save_interval=5"]
    job = Job("sft.py", command, directory / "probed")
    job.wait_for_step(13)
    job.kill()
    probed = Job("sft.py", command, directory / "probed").succeed()
    return probed.run_dir, unprobed.succeed().run_dir


@pytest.fixture(scope="module")
def probed(both):
    return both[0]


@pytest.fixture(scope="module")
def unprobed(both):
    return both[1]


def test_probes_leave_the_training_as_it_was_bit_for_bit(probed, unprobed):
    """This also holds when the probed run was killed in between."""
    expected, found = exported(unprobed), exported(probed)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    for kind in (steps, validations):
        assert [without_times(row) for row in kind(probed)] == [without_times(row) for row in kind(unprobed)]
    assert probes(unprobed) == []


def test_a_probe_comes_first_at_every_interval_and_last(probed):
    assert [row["step"] for row in probes(probed)] == [0, 10, 20, STEPS]


def test_the_distance_is_that_from_the_policy_before_fine_tuning(probed):
    first, *later = probes(probed)
    for name in ("per_response", "k3", "exact", "reference"):
        assert first[f"probe/kl/{name}"] == 0, "the policy is the reference"
    for row in later:
        assert row["probe/kl/exact"] > 0.1
        # All three estimate the same; with few responses they agree in size only.
        for name in ("per_response", "k3"):
            assert row[f"probe/kl/{name}"] == pytest.approx(row["probe/kl/exact"], rel=0.5)


def test_the_exact_distance_is_the_kl_of_next_token_distributions(probed, model):
    """The last probe's KL is computed again by transformers from the exported model and the model before."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(p).double() for p in (probed / "hf", model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    kl = []
    for sample in samples(probed, STEPS):
        prompt, response = (tokenizer.encode(sample[key], add_special_tokens=False) for key in ("prompt", "response"))
        ids, predictors = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        with torch.no_grad():
            own, old = (torch.log_softmax(m(ids).logits[0, predictors], -1) for m in (policy, reference))
        kl.append((own.exp() * (own - old)).sum().item())
    assert len(kl) == PROMPTS * SAMPLES
    assert probes(probed)[-1]["probe/kl/exact"] == pytest.approx(fmean(kl), rel=1e-4)


def test_the_reward_is_that_of_the_first_stage_on_its_held_out_prompts(probed):
    held_out = rows("prompts", seed="1", heldout="1")[:PROMPTS]
    written = samples(probed, STEPS)
    answers = {f"<bos> {row['prompt']} <sep>": row for row in held_out}
    assert {sample["prompt"].strip() for sample in written} == set(answers)
    columns = [answers[sample["prompt"].strip()] for sample in written]
    texts = [sample["response"].removesuffix("<eos>") for sample in written]
    named = {key: [row[key] for row in columns] for key in ("task", "answer", "refusal")}
    scores = toy_reward(None, texts, **named)
    assert probes(probed)[-1]["probe/reward/mean"] == pytest.approx(fmean(scores))
    assert [sample["reward"] for sample in written] == pytest.approx(scores)


def test_accuracy_is_what_greedy_decoding_gets_exactly_right(probed):
    """Compare on the task's held-out examples with transformers' generate on the exported model."""
    model = AutoModelForCausalLM.from_pretrained(probed / "hf")
    tokenizer = AutoTokenizer.from_pretrained(probed / "hf")
    right = []
    for row in rows("alpaca", seed="1", heldout="1")[:HELD_OUT]:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}], return_tensors="pt")
        out = model.generate(**ids, do_sample=False, max_new_tokens=6)[0, ids["input_ids"].shape[1] :]
        right.append(tokenizer.decode(out, skip_special_tokens=True).strip() == row["completion"])
    last = validations(probed)[-1]
    assert last["step"] == STEPS and math.isfinite(last["validation/loss"])
    assert 0 < last["validation/token_accuracy"] < 1
    assert last["validation/accuracy"] == fmean(right)


def samples(run_dir, step: int) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "probe" / f"step_{step:08d}.jsonl").read_text().splitlines()]
