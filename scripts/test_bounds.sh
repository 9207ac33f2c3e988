#!/bin/sh
# Try the package at both ends of its version bounds, each in an environment of its own below .venv-bounds.
#
#     scripts/test_bounds.sh [PYTHON]          (make test-bounds)
#
# lowest: requirements/lowest.txt; newest: what pip finds today. Some of the tests, then a run of SASRec and one of
# LLMRanker with the tiny LLM. An environment that is there is used again; remove .venv-bounds to begin anew.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
base=${1:-python3}
export OMP_NUM_THREADS=1
tests="tests/test_loss.py tests/test_token_tree.py tests/test_config.py tests/test_cli.py tests/test_stats.py tests/test_table.py"

try() { # NAME
    echo "== $1: $("$root/.venv-bounds/$1/bin/python" -c "import numpy, pandas, scipy, torch, transformers
print(*(f'{m.__name__} {m.__version__}' for m in (numpy, pandas, scipy, torch, transformers)))")"
    # shellcheck disable=SC2086
    "$root/.venv-bounds/$1/bin/python" -m pytest -q -p no:cacheprovider $tests
    work=$(mktemp -d)
    for run in "-m SASRec" "-m LLMRanker --llm=tiny --loss=DMPO"; do
        # shellcheck disable=SC2086
        (cd "$work" && PYTHONPATH=$root "$root/.venv-bounds/$1/bin/python" -m recbole_llm run $run -d ml-100k --epochs=1 \
            --few_shot=50 --eval_users=30 --show_progress=False >told.txt 2>&1) || { tail -30 "$work/told.txt"; exit 1; }
        echo "$1: recbole-llm run $run: $(grep -m 1 '"ndcg@10"' "$work/told.txt" || echo finished)"
    done
    rm -rf "$work"
}

mkdir -p .venv-bounds
PIP_CONSTRAINT=$root/requirements/lowest.txt VENV=.venv-bounds/lowest scripts/setup_env.sh run "$base"
.venv-bounds/lowest/bin/python -m pip install -qq -c requirements/lowest.txt pytest pytest-timeout hypothesis statsmodels
VENV=.venv-bounds/newest scripts/setup_env.sh run "$base"
.venv-bounds/newest/bin/python -m pip install -qq pytest pytest-timeout hypothesis statsmodels
try lowest
try newest
