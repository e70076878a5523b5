#!/usr/bin/env bash
# datasets 5.2.0 does not keep the strings of a JSON lines file. Arrow's reader infers a type for each column from what strings
# look like: a column of "2024-05-01" becomes timestamps; and beside a single value that isn't a string, strings are parsed as
# JSON: "08" becomes 8, "null" becomes None, "123456789012345678901" becomes another number. Saying the type does not help:
# with features=Features(Value("string")) the date is "2024-05-01 00:00:00". Answers of a data set thus differ from the file
# without a word, and differ between files of one set, since each is inferred by itself.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1, Python 3.11. Source: datasets/packaged_modules/json/json.py (Arrow's read_json, then
# table_cast; columns of several types as Json).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install datasets==5.2.0 pyarrow==26.0.1
cat > "$work/dates.jsonl" <<'J'
{"answer": "2024-05-01"}
{"answer": "1999-12-31"}
J
cat > "$work/mixed.jsonl" <<'J'
{"answer": 5}
{"answer": "08"}
{"answer": "null"}
{"answer": "123456789012345678901"}
J
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/env/bin/python" - "$work" <<'P'
import json
import sys

import datasets

datasets.disable_progress_bars()
work = sys.argv[1]


def answers(name, **options):
    return datasets.load_dataset("json", data_files=f"{work}/{name}", split="train", **options)["answer"][:]


changed = 0
for name, options in (
    ("dates.jsonl", {}),
    ("dates.jsonl", {"features": datasets.Features(answer=datasets.Value("string"))}),
    ("mixed.jsonl", {}),
):
    stands = [json.loads(line)["answer"] for line in open(f"{work}/{name}")]
    read = answers(name, **options)
    changed += read != stands
    print(f"{name}{' with features' if options else ''}\n  stands {stands}\n  read   {read}")
sys.exit(0 if changed == 3 else 1)
P
