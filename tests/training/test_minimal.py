"""recipes/minimal.py is the algorithm: its first step is the recipe's, to the last bit."""

import json
import subprocess
import sys

from runs import RECIPES, Job, steps

SCRIPT = (
    "import json, sys, minimal; minimal.make_model(sys.argv[1]); print(json.dumps(minimal.train(sys.argv[1], steps=1)))"
)


def test_the_first_step_is_that_of_the_recipe(tmp_path):
    sys.path.insert(0, str(RECIPES))
    try:
        import minimal
    finally:
        sys.path.remove(str(RECIPES))
    model = str(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model], cwd=RECIPES, capture_output=True, text=True, check=True
    )
    [found] = json.loads(done.stdout.splitlines()[-1])
    overrides = [
        f"model.path={model}",
        "model.precision=fp32",
        "objective=frpo",
        f"objective.lambda_={minimal.OBJECTIVE.lambda_}",
        f"objective.beta={minimal.OBJECTIVE.beta}",
        f"optim.lr={minimal.LEARNING_RATE}",
        "data.train=[{path: 'python:frpo_nemo.examples.toy.rows?part=prompts'}]",
        f"data.max_prompt_tokens={minimal.MAX_PROMPT_TOKENS}",
        f"rollout.prompts_per_step={minimal.PROMPTS_PER_STEP}",
        f"rollout.group_size={minimal.GROUP_SIZE}",
        f"rollout.max_response_tokens={minimal.MAX_RESPONSE_TOKENS}",
        f"reward.answers.target={RECIPES}/minimal.py:score",
        f"trainer.seed={minimal.SEED}",
        "trainer.microbatch_tokens=4096",
        "trainer.max_steps=1",
    ]
    [step] = steps(Job("frpo.py", overrides, tmp_path / "run").succeed().run_dir)
    assert 0 < found["reward"] < 1 and found["gradient_norm"] > 0
    assert found == {
        "reward": step["reward/mean"],
        "kl": step["kl/reference"],
        "gradient_norm": step["gradient_norm"],
    }
