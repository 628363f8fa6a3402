#!/usr/bin/env bash
# Makes .venv with the `megallama` command. Arguments: extras to install, such as `test`.
# Safe to run again: whatever an interrupted run left is completed.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
extras=${1:+[$1]}

fail() { echo "install: $1" >&2; exit 78; }

command -v "$python" >/dev/null || fail "$python not found; apt install python3 python3-venv"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version) is too old; 3.10 or newer is needed (PYTHON=python3.11 make …)"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "Python's venv module is missing; apt install python3-venv"
command -v c++ >/dev/null || echo "install: no C++ compiler; apt install g++ (optional)" >&2

# An interrupted `venv` leaves a folder without pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
# What is imported is compiled then: of the files that come, that is a small part.
install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

torch=$(sed -n 's/^torch==//p' constraints.txt)
install_torch() {
    if command -v nvidia-smi >/dev/null || [ "$(uname -s)" != Linux ]; then
        install "torch==$torch" -c constraints.txt
        return
    fi
    # Linux wheels of plain `torch` bring gigabytes of CUDA; the CPU build has a version suffix,
    # or an index of its own that uv knows by name.
    install "torch==$torch+cpu" 2>/dev/null && return
    install uv &&
        .venv/bin/uv pip install --quiet --python .venv/bin/python --torch-backend cpu \
            "torch==$torch" 2>/dev/null && return
    echo "install: no CPU build of torch found; installing the CUDA build (several GB)" >&2
    install "torch==$torch"
}
.venv/bin/python -c 'import importlib.metadata as m, sys
sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' "$torch" 2>/dev/null || install_torch
install -c constraints.txt -e ".$extras"
.venv/bin/python -c 'import megallama.kernels._native' 2>/dev/null ||
    echo "install: built no kernels (csrc/); their PyTorch references run instead" >&2
