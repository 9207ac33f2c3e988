#!/bin/sh
# Make the virtual environment .venv ready; `make run` and `make test` call this.
#
#     scripts/setup_env.sh run|dev [PYTHON]
#
# run: the package with what it needs; dev: the test tools on top. An interrupted set-up is started afresh.
# Without a GPU the CPU build of torch is taken (0.2 GB instead of several). Set TORCH to ask pip for another one,
# for instance TORCH=torch==2.14.1. VENV names another folder than .venv. LOCKED=1 takes the versions and hashes of
# requirements/lock.txt (dev: lock-dev.txt), on Linux with Python 3.11.
set -eu

TORCH_CPU=2.13.0
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

goal=${1:-run}
base=${2:-python3}
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
python=$venv/bin/python
unfinished=$venv/.unfinished
began=$(date +%s)
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "set-up [$(($(date +%s) - began)) s] $*"; }

at_least() { "$1" -c "import sys; sys.exit(sys.version_info < ($2))"; }

# pip would compile every file of every package; the first import compiles those that are used.
install() { "$python" -m pip install -qq --no-compile "$@"; }

has_gpu() { nvidia-smi >/dev/null 2>&1; }

# True where pip's own sources offer the CPU build (they are listed, nothing is fetched).
cpu_build_offered() { "$python" -m pip index versions torch 2>/dev/null | grep -q "[ (]$TORCH_CPU+cpu"; }

make_venv() {
    if [ -e "$unfinished" ]; then
        say "the last set-up was interrupted: starting afresh"
        rm -rf "$venv"
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        say "creating $venv with $("$base" --version)"
        "$base" -m venv --clear "$venv"
    fi
    touch "$unfinished"
}

# Set `torch` to what pip is asked for; empty where the range in setup.cfg says enough.
choose_torch() {
    torch=${TORCH:-}
    if [ -n "$torch" ] || "$python" -m pip show -qq torch 2>/dev/null; then
        return
    elif has_gpu; then
        say "GPU found: torch with CUDA, a download of several GB"
    elif [ "$(uname)" != Linux ]; then
        say "torch as pip offers it"
    elif cpu_build_offered; then
        say "no GPU found: torch $TORCH_CPU for the CPU"
        torch=torch==$TORCH_CPU+cpu
    else
        say "no GPU found: torch $TORCH_CPU for the CPU, from $TORCH_CPU_INDEX"
        install "torch==$TORCH_CPU" --index-url "$TORCH_CPU_INDEX" || {
            say "not to be had there; TORCH=torch takes what pip's own index offers, which may be several GB"
            exit 1
        }
    fi
}

# torch comes before: its CPU and CUDA builds have different files, so the lock leaves it out.
install_locked() {
    lock=requirements/lock.txt
    [ "$goal" = run ] || lock=requirements/lock-$goal.txt
    if at_least "$python" "3, 12" || [ "$(uname)" != Linux ]; then
        say "LOCKED: $lock is for Python 3.11 on Linux; leave LOCKED out"
        exit 2
    fi
    say "installing what $lock names"
    [ -z "$torch" ] || install "$torch"
    install --no-deps --require-hashes -r "$lock"
    install --no-deps --no-build-isolation --editable .
}

install_packages() {
    package=.
    [ "$goal" = run ] || package=".[$goal]"
    quiet=
    if at_least "$python" "3, 12"; then
        say "RecBole without its dependencies: its ray has no build for $("$python" --version)"
        install --no-deps recbole==1.2.1
        quiet=--no-warn-conflicts # pip would call the missing ray an error; nothing imports it
    fi
    say "installing $package and what it needs"
    install $quiet ${torch:+"$torch"} --editable "$package"
}

first_import() {
    say "first import"
    PYTHONDONTWRITEBYTECODE='' "$python" -c "import recbole_llm.quick_start, recbole_llm.llm.pretrained"
}

if ! at_least "$base" "3, 11"; then
    echo "set-up: Python 3.11 or newer is needed, but $base is $("$base" --version 2>&1)." \
        "Name another: make PYTHON=/path/to/python3.11 ..." >&2
    exit 2
fi
make_venv
choose_torch
if [ -n "${LOCKED:-}" ]; then install_locked; else install_packages; fi
first_import
touch "$venv/.ready"
[ "$goal" = run ] || touch "$venv/.ready-$goal"
rm "$unfinished"
say "ready: $venv, $(du -sh "$venv" | cut -f1)"
