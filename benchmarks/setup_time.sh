#!/usr/bin/env bash
# Seconds that `make setup` takes at two commits, in turn: from empty caches, from full ones, and when all is there.
#
#   benchmarks/setup_time.sh OLD [NEW]        commits of this repository; NEW is HEAD unless given
set -euo pipefail
old=${1:?usage: benchmarks/setup_time.sh OLD [NEW]} new=${2:-HEAD}
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

timed() { # timed COMMIT: prints a row of the table
  local tree=$work/$1 row="| $1 |"
  export PIP_CACHE_DIR=$work/pip-$1 UV_CACHE_DIR=$work/uv-$1
  git -C "$root" worktree add -q --detach "$tree" "$1"
  for state in cold warm done; do
    [ "$state" = done ] || rm -rf "$tree/.venv"
    local begun=$EPOCHREALTIME
    make -C "$tree" -s setup >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
    row+=$(awk -v a="$begun" -v b="$EPOCHREALTIME" 'BEGIN { printf " %.1f |", b - a }')
  done
  git -C "$root" worktree remove --force "$tree"
  echo "$row"
}

echo "| commit | empty caches, s | full caches, s | second call, s |"
echo "| --- | ---: | ---: | ---: |"
timed "$(git -C "$root" rev-parse --short "$old")"
timed "$(git -C "$root" rev-parse --short "$new")"
