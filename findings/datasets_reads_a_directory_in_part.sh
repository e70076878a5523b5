#!/usr/bin/env bash
# datasets 5.2.0 reads a directory of data files in part and does not say so. A single file whose name has the word train hides
# all others from the split train; of files in several formats, only those of the commonest format are read; a backup such as
# rows.jsonl.bak is read as data beside rows.jsonl, so that its rows come twice.
#
# Seen with datasets 5.2.0, pyarrow 26.0.1, Python 3.11. Source: datasets/data_files.py (patterns of splits), datasets/load.py
# (infer_module_for_data_files takes the most common suffix).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install datasets==5.2.0 pyarrow==26.0.1
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/env/bin/python" - "$work" <<'P'
import pathlib
import sys

import datasets

datasets.disable_progress_bars()
cases = {
    ("train.jsonl", "more.jsonl"): ["train.jsonl"],
    ("a.jsonl", "b.jsonl", "c.csv"): ["a.jsonl", "b.jsonl"],
    ("rows.jsonl", "rows.jsonl.bak"): ["rows.jsonl", "rows.jsonl.bak"],
}
same = True
for number, (names, expected) in enumerate(cases.items()):
    directory = pathlib.Path(sys.argv[1], str(number))
    directory.mkdir()
    for name in names:
        row = f"prompt\n{name}\n" if name.endswith(".csv") else f'{{"prompt": "{name}"}}\n'
        (directory / name).write_text(row)
    read = sorted(datasets.load_dataset(str(directory), split="train")["prompt"][:])
    print(f"files {', '.join(names)}: read {', '.join(read)}")
    same &= read == expected
sys.exit(0 if same else 1)
P
