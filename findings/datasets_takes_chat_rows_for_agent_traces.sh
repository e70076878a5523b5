#!/usr/bin/env bash
# datasets 5.2.0 takes JSON lines with the columns id, source, model, system_prompt and messages, as chat data often have them,
# for traces of an agent, and load_dataset ends by asking for another package, teich. Without the column system_prompt the same
# rows are read. The option parse_agent_traces=False, which the message does not name, reads them.
#
# Seen with datasets 5.2.0, Python 3.11. Source: datasets/packaged_modules/json/json.py (the schemas of traces).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install datasets==5.2.0
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/env/bin/python" - "$work" <<'P'
import json
import sys

import datasets

datasets.disable_progress_bars()
row = {"id": "1", "source": "s", "model": "m", "system_prompt": "Be brief.", "messages": [{"role": "user", "content": "hi"}]}
path = f"{sys.argv[1]}/rows.jsonl"


def read(row, **options):
    with open(path, "w") as file:
        file.write(json.dumps(row) + "\n")
    try:
        return len(datasets.load_dataset("json", data_files=path, split="train", **options))
    except Exception as error:
        return str(error.__cause__ or error)


whole = read(row)
off = read(row, parse_agent_traces=False)
without = read({name: value for name, value in row.items() if name != "system_prompt"})
print(f"all columns:            {whole}\nparse_agent_traces off: {off}\nwithout system_prompt:  {without}")
sys.exit(0 if "teich" in str(whole) and off == without == 1 else 1)
P
