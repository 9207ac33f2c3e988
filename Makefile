# The virtual environment is .venv. Another interpreter: make PYTHON=python3.12 run
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test test-faults lint bench clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: .venv/.ready ## set up, then compare LLM rankers with classic models on a small scale (under 15 minutes)
	$(BIN)/recbole-llm compare --config_files=properties/compare/quick.yaml

test: .venv/.ready-dev ## set up with the test tools, then run the tests: two at a time, then those that measure time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not alone and not faults"
	$(BIN)/python -m pytest -q -m alone

test-faults: .venv/.ready-dev ## kills, faults and fuzzed inputs, the long ones too, and how many were survived (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "faults or injects"

lint: .venv/.ready-dev ## look for mistakes without running anything
	$(BIN)/ruff check .

bench: .venv/.ready-dev ## hold our speed against other ways to do it (hours; benchmarks/README.md)
	$(BIN)/python benchmarks/train_preference.py
	$(BIN)/python benchmarks/train_preference.py --memory --prompt 300 600 --k 7 15
	$(BIN)/python benchmarks/stream_training.py
	$(BIN)/python benchmarks/score_candidates.py
	$(BIN)/python benchmarks/full_catalogue.py --rounds=3
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/runner_overhead.py --rounds=3

clean: ## remove builds and caches; results in saved/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/.ready: setup.cfg scripts/setup_env.sh
	@scripts/setup_env.sh run "$(PYTHON)"

.venv/.ready-dev: setup.cfg scripts/setup_env.sh
	@scripts/setup_env.sh dev "$(PYTHON)"
