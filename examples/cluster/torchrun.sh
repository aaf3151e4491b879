#!/usr/bin/env bash
# One run on all GPUs of this machine: ./torchrun.sh run.toml
set -euo pipefail
config=${1:?the config comes first: ./torchrun.sh run.toml}
shift
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
# When a rank dies, torchrun ends the others and starts all again; they go on from the newest checkpoint.
exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m rlft train "$config" --resume auto "$@"
