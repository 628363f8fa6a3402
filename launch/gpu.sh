#!/usr/bin/env bash
# launch/gpu.sh test|bench: builds csrc/ for the GPU that is there, and runs the tests or benchmarks
# that need it, each within nine minutes. Results are JSON in $MEGALLAMA_RESULTS, or
# benchmarks/results. Nothing is installed: PYTHON (python3) is one with torch for CUDA and the
# packages of setup.py; of the extra `test`, pytest, hypothesis and pybind11, for the peers
# transformers. What comes after `test` goes to pytest.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${MEGALLAMA_RESULTS:-benchmarks/results}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# The largest models leave no room for gaps between blocks.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

fail() { echo "gpu: $1" >&2; exit 78; }

what=${1:-}
[ "$what" = test ] || [ "$what" = bench ] ||
    fail "'$what' is not known; run launch/gpu.sh test or bench"
shift
found=$("$python" -c '
import sysconfig, torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}", sysconfig.get_config_var("EXT_SUFFIX"))' 2>/dev/null) ||
    fail "$python finds no GPU through torch; name another Python with PYTHON=…"
read -r arch suffix <<<"$found"
command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    fail "nvcc not found; install CUDA's compiler, or set CUDA_HOME"

# Beside what an interpreter of another version has built, and only what is older than its sources.
built=build/gpu-$arch/_native$suffix
MEGALLAMA_CUDA_ARCHS=$arch "$python" csrc/build.py "$built"
# By a rename: whoever runs the old one keeps it.
cp "$built" "megallama/kernels/_native$suffix.new"
mv "megallama/kernels/_native$suffix.new" "megallama/kernels/_native$suffix"

if [ "$what" = test ]; then
    exec "$python" -m tests.gpu --seconds 330 --json "$results/tests-gpu.json" "$@"
fi
code=0
"$python" benchmarks/kernels_gpu.py --seconds 130 --json "$results/kernels-gpu.json" || code=$?
"$python" benchmarks/training_step_gpu.py --seconds 300 \
    --json "$results/training-step-gpu.json" || code=$?
exit $code
