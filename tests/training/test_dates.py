"""A run whose chat template writes the date continues on another day with the prompts that it began with."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timedelta
from pathlib import Path

from runs import Job, random_model, steps

DATED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + ' ' + eos_token }}{% else %}{{ '<bos> ' + message['content'] + ' <sep> ' }}"
    "{{ 'a1 ' if strftime_now('%d %b %Y') == 'TODAY' else 'a2 ' }}{% endif %}{% endfor %}"
)


def test_a_run_continues_on_another_day_with_the_prompts_it_began_with(tmp_path):
    model = Path(random_model(tmp_path / "model"))
    today = datetime.now()
    (model / "chat_template.jinja").write_text(DATED.replace("TODAY", today.strftime("%d %b %Y")))
    overrides = [
        "--config-name=experiment/demo_sft",
        f"model.path={model}",
        "parallel=single",
        "trainer.val_interval=0",
    ]
    overrides += ["data.max_prompt_tokens=12", "data.max_tokens=24"]
    run = Job("sft.py", [*overrides, "trainer.max_steps=2"], tmp_path / "run").succeed().run_dir
    shutil.rmtree(run / "hf")
    later = {"TZ": "LATER-48"}  # two days on, by the clock of this process
    Job("sft.py", [*overrides, "trainer.max_steps=3"], run, environment=later).succeed()
    first, second = (json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines())
    assert second["data"] == first["data"] and second["moment"] == first["moment"]
    assert datetime.strptime(second["time"][:19], "%Y-%m-%d %H:%M:%S") > today + timedelta(days=1)
    assert [row["step"] for row in steps(run)] == [1, 2, 3]
