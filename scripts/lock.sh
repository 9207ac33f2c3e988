#!/bin/sh
# Write requirements/lock.txt and lock-dev.txt: what .venv holds, each version with the hashes of its files.
#
#     scripts/lock.sh          (make lock)
#
# Run it where the tests have passed: versions are those of .venv. torch is left out, since its CPU and CUDA builds are
# different packages; scripts/setup_env.sh names its version.
set -eu
cd "$(dirname "$0")/.."
uv=.venv-release/bin/uv
version=$(sed -n 's/^TORCH_CPU=//p' scripts/setup_env.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/python -m pip freeze --exclude-editable | grep -v -i -e '^torch==' -e '^recbole-llm' >"$work/now.txt"
echo "torch==$version+cpu" >"$work/torch.txt"

compile() { # FILE CONSTRAINTS [OPTION ...]
    file=$1 constraints=$2
    shift 2
    UV_FIND_LINKS=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-https://download.pytorch.org/whl/cpu/torch}} \
        "$uv" pip compile -q setup.cfg "$@" --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --generate-hashes --no-annotate --no-emit-package torch --override "$work/torch.txt" --constraint "$constraints" \
        --custom-compile-command "make lock" --output-file "$work/$(basename "$file")"
    mv "$work/$(basename "$file")" "$file"
    echo "written: $file, $(grep -c '==' "$file") packages"
}

compile requirements/lock.txt "$work/now.txt"
compile requirements/lock-dev.txt "$work/now.txt" --extra dev
