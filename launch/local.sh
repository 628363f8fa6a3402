#!/usr/bin/env bash
# launch/local.sh CONFIG [section.key=value …]: trains on all GPUs of this machine, or on its CPU in
# one process, as a SLURM job would: started again where a rank is lost, up to three times without a
# newer checkpoint. RANKS (the GPUs) says how many processes.
set -euo pipefail

fail() { echo "local: $1" >&2; exit 78; }

[ $# -gt 0 ] || fail "no config; run launch/local.sh CONFIG [section.key=value …]"
command -v megallama >/dev/null || fail "megallama not found; make install && . .venv/bin/activate"
gpus=0
if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus | grep -c '^GPU ') || fail "nvidia-smi finds no GPU; see its output"
fi
# A thread a core in each rank would be too many; and equal bits need equal numbers of threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The largest models leave no room for gaps between blocks.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec megallama train "$@" --nproc "${RANKS:-$((gpus > 0 ? gpus : 1))}" --restarts 3
