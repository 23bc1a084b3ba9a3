#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG GPUS [flags of train.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each. On one machine PORT is a
# free one unless it is set. Without GPUs, GPUS is the number of processes.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: $0 CONFIG GPUS [flags of train.py]" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2
source "$(dirname "$0")/_dist.sh"

launch "$GPUS" train.py "$CONFIG" --launcher pytorch "${@:3}"
