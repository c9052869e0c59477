#!/usr/bin/env bash
# Build the native libraries and put each into the folder of its Python package.
# Usage: build_native.sh [PREFIX]   PREFIX: folder that stands for the package mqc; default: the
#                                   repository, for an editable install
# Environment: CXX, MQC_ORT_INCLUDE (onnxruntime's headers), MQC_BUILD_DIR (default build/native),
#              MQC_CMAKE_ARGS, CMAKE_BUILD_PARALLEL_LEVEL
# Ends with 1 and the remedy in one line where something needed is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
prefix=${1:-$PWD}
build=${MQC_BUILD_DIR:-build/native}
PATH=$PWD/${VENV:-.venv}/bin:$PATH # CMake and Ninja from the development extra

fail() {
    printf 'native: %s\n' "$@" >&2
    exit 1
}

command -v cmake >/dev/null || fail "cmake is missing: apt-get install cmake, or pip install cmake"
command -v "${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    fail "a C++ compiler is missing: apt-get install g++"

generator=()
if [ ! -f "$build/CMakeCache.txt" ]; then
    if command -v ninja >/dev/null; then
        generator=(-G Ninja)
    elif ! command -v make >/dev/null; then
        fail "make or ninja is missing: apt-get install make"
    fi
elif ! grep -qxF "CMAKE_HOME_DIRECTORY:INTERNAL=$PWD" "$build/CMakeCache.txt"; then
    rm -rf "$build" # made for another copy of the sources
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
{
    cmake -S . -B "$build" "${generator[@]}" ${MQC_CMAKE_ARGS:-} &&
        cmake --build "$build" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}" &&
        cmake --install "$build" --prefix "$prefix" --component native
} >"$log" 2>&1 || {
    tail -n 40 "$log" >&2
    fail "the native build failed, see above (in $build)"
}
if [ ! -f "$prefix/backends/onnx/libmqc_onnx.so" ]; then
    grep -m 3 '^headers:' "$log" >&2 || true
    fail "onnxruntime's headers are missing: set MQC_ORT_INCLUDE to their folder" \
        "(Debian: libonnxruntime-dev; elsewhere the include folder of an onnxruntime release)"
fi
echo "native: $prefix/backends/onnx/libmqc_onnx.so"
