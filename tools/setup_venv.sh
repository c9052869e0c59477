#!/usr/bin/env bash
# Make or refresh .venv with mqc (editable), its CPU runtime and the development tools.
# Safe to run again. Environment: PYTHON (interpreter), VENV (folder, default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}

fail() {
    printf 'set-up: %s\n' "$@" >&2
    exit 1
}

usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if command -v "$name" >/dev/null && usable "$name"; then
            printf '%s\n' "$name"
            return
        fi
    done
    return 1
}

apt_install() {
    printf 'set-up: installing %s with apt-get\n' "$*"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$@" >/dev/null
}

is_root_on_debian() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }

if ! python=$(find_python); then
    is_root_on_debian && apt_install python3 python3-venv || true
    python=$(find_python) || fail "no Python 3.11 or newer found" \
        "install one (Debian: sudo apt-get install python3 python3-venv) or set PYTHON=/path/to/python"
fi

# Debian splits ensurepip, which venv needs, into a package of its own.
if [ ! -x "$venv/bin/pip" ]; then
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if is_root_on_debian; then
            apt_install "python$version-venv" || apt_install python3-venv || true
        fi
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make virtual environments (ensurepip is missing)" \
                "on Debian or Ubuntu: sudo apt-get install python$version-venv"
    fi
    "$python" -m venv "$venv"
fi

printf 'set-up: installing mqc and its dependencies into %s\n' "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable '.[cpu,dev]'

# CUTLASS's headers, which tests/cuda/cute compares the kernels with. They are of use only beside
# CUDA's; beside the packages, because what CUTLASS's Python modules need is not wanted.
headers=$venv/share/nvidia-cutlass
if { command -v nvcc || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; } >/dev/null &&
    [ ! -d "$headers" ]; then
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --no-deps --target "$headers" nvidia-cutlass ||
        echo "set-up: going on without CUTLASS's headers: tests/cuda/cute will be skipped" >&2
fi
