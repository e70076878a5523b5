#!/usr/bin/env bash
# What both images run while they are built, as root and in this order:
#   install.sh packages       Ubuntu's packages
#   install.sh environment    .venv-gpu, with exactly the packages of requirements/gpu.txt
# No version is named here: requirements/gpu.txt has those of Python's packages, and the base image decides the rest.
set -euo pipefail
cd "$(dirname "$0")/.."

packages() {
  local needed=(
    python3-venv python3-dev      # Triton compiles against the headers while a run goes on
    g++ make ca-certificates
    git                           # a run records the commit of its checkout
    bubblewrap                    # the sandbox of rewards that run programs
    libibverbs1 ibverbs-providers # without them NCCL uses TCP between nodes, also over InfiniBand
  )
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${needed[@]}"
  rm -rf /var/lib/apt/lists/*
}

environment() {
  local uv=.venv-gpu/bin/uv python=.venv-gpu/bin/python
  # The cache beside the environment, so that uv makes hard links instead of copies. Bytecode, because a job cannot write
  # it into the image, and every process would compile what it imports.
  export UV_CACHE_DIR=$PWD/.cache UV_COMPILE_BYTECODE=1 PIP_NO_CACHE_DIR=1
  make setup-gpu PYTHON_GPU=python3
  # The project comes from the mounted checkout. A copy in the image could be another version of it.
  "$uv" pip uninstall --python "$python" frpo-nemo
  "$uv" pip sync --check --python "$python" requirements/gpu.txt
  rm -rf .cache
}

case ${1:-} in
  packages | environment) "$1" ;;
  *) echo "usage: install.sh packages|environment" >&2; exit 2 ;;
esac
