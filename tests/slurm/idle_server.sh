#!/usr/bin/env bash
# Where a test looks at a server's job alone: it serves nothing, until it is cancelled.
#SBATCH --mem=100M
echo "given: $*"
sleep infinity
