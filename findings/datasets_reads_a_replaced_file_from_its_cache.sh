#!/usr/bin/env bash
# datasets 5.2.0 knows a local file by its path and modification time. A file that is replaced by another of the same time, as
# rsync -t, cp -p, tar and a checkout with fixed times do, is not read: load_dataset gives the rows of the file before, from
# its cache, although size and content differ. A program that reads the file itself sees the new rows at the same moment.
#
# Seen with datasets 5.2.0, Python 3.11. Source: datasets/data_files.py (_get_single_origin_metadata: path and mtime).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q --disable-pip-version-check install datasets==5.2.0
read_prompt() {
    HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$work/cache" "$work/env/bin/python" -c "
import datasets, sys
datasets.disable_progress_bars()
print(datasets.load_dataset('json', data_files=sys.argv[1], split='train')['prompt'][0])" "$work/rows.jsonl"
}
echo '{"prompt": "the old row"}' > "$work/rows.jsonl"
touch -d 2024-01-01T00:00:00Z "$work/rows.jsonl"
echo "first file, read:  $(read_prompt)"
echo '{"prompt": "a new and longer row"}' > "$work/rows.jsonl"
touch -d 2024-01-01T00:00:00Z "$work/rows.jsonl"
second=$(read_prompt)
echo "second file, has:  $(cat "$work/rows.jsonl")"
echo "second file, read: $second"
[[ $second == "the old row" ]]
