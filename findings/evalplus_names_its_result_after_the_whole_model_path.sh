#!/usr/bin/env bash
# evalplus 0.3.1 names the file of samples after the model's whole path (slashes become --), and the file of results by
# replacing ".jsonl" with "_eval_results.json" everywhere in that path, 11 characters longer at the end. A path of some 230
# characters, as run directories on clusters have, gives samples whose name fits into 255 bytes and results whose name does
# not: all solutions are generated and tested, and then open() fails with "File name too long" and no score is left. Where a
# directory has ".jsonl" in its name, the results are looked for in a directory that does not exist.
#
# Seen with evalplus 0.3.1, Python 3.11. Source: evalplus/codegen.py (identifier), evalplus/evaluate.py (result_path).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=$(ls "$HOME"/.pyenv/versions/3.11*/bin/python 2>/dev/null | head -1 || true)
"${python:-python3.11}" -m venv "$work/env"
"$work/env/bin/pip" -q -q --disable-pip-version-check install "setuptools<81" wheel
"$work/env/bin/pip" -q -q --disable-pip-version-check install --no-build-isolation evalplus==0.3.1

cat >"$work/problem.jsonl" <<'JSON'
{"task_id": "HumanEval/0", "prompt": "def f(text):\n", "canonical_solution": "    return int(text)\n", "base_input": [["1"]], "plus_input": [["4"]], "atol": 0, "entry_point": "f", "contract": ""}
JSON
solution='{"task_id": "HumanEval/0", "solution": "def f(text):\n    return int(text)\n"}'
export HUMANEVAL_OVERRIDE_PATH=$work/problem.jsonl XDG_CACHE_HOME=$work/cache TOKENIZERS_PARALLELISM=false

evaluate() { # a file of samples
  "$work/env/bin/python" -m evalplus.evaluate --dataset humaneval --samples "$1" --parallel 1 2>&1 | grep -E "^pass@1|Error" || true
}

long=$work/$(printf 'a%.0s' {1..220})--model_hf_temp_0.0.jsonl # 245 bytes, which is a valid name
short=$work/model_hf_temp_0.0.jsonl inside=$work/rows.jsonl.d/model_hf_temp_0.0.jsonl
mkdir "$work/rows.jsonl.d"
for file in "$short" "$long" "$inside"; do echo "$solution" >"$file"; done
echo "short name:                   $(evaluate "$short" | tail -1)"
too_long=$(evaluate "$long" | tail -1 | cut -c1-60)
echo "samples' name of 245 bytes:   $too_long"
elsewhere=$(evaluate "$inside" | tail -1 | cut -c1-60)
echo "a directory rows.jsonl.d:     $elsewhere"
ls "$work"/*_eval_results.json | sed "s|$work/|results on disk:              |"
[[ $too_long == *"File name too long"* && $elsewhere == *"No such file"* && -f $work/model_hf_temp_0.0_eval_results.json ]]
