#!/usr/bin/env bash
# One run on 1 to 4 machines: the same command on each of them, HOST being one of them.
# A machine that joins or leaves restarts the ranks, which go on from the newest checkpoint.
set -euo pipefail
host=${1:?./torchrun-nodes.sh HOST run.toml}
config=${2:?./torchrun-nodes.sh HOST run.toml}
shift 2
exec torchrun \
    --nnodes "${NODES:-1:4}" \
    --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$host:29500" \
    --rdzv-id "${RUN_ID:-rlft}" \
    --max-restarts 20 \
    -m rlft train "$config" --resume auto "$@"
