#!/bin/sh
# Writes the lock files: exact versions for every Python from 3.10 on (`make lock`).
# Usage: lock.sh UV
set -eu
uv=$1
cd "$(dirname "$0")"

lock() {
    name=$1
    shift
    {
        printf '# Written by `make lock` from %s.in; do not edit.\n' "$name"
        "$uv" pip compile --quiet --universal --python-version 3.10 --no-header --no-annotate \
            --no-python-downloads "$name.in" "$@" | grep -v -E '^(cuda-|nvidia-cu|nvidia-n[cv])'
    } >"$name.txt.new"
    mv "$name.txt.new" "$name.txt"
}

# The CUDA packages are left out: torch names their exact versions itself, and its CPU build
# needs none of them.
lock python
for distribution in kilted jazzy; do
    lock "$distribution" --constraint python.txt
done
