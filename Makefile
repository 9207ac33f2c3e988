# The virtual environment is .venv. Another interpreter: make PYTHON=python3.12 run
PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin
JOBS ?= 1

.DEFAULT_GOAL := help
.PHONY: help run results test test-faults test-bounds coverage lint lock audit sbom bench clean

help: ## say what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

run: .venv/.ready ## set up, then compare LLM rankers with classic models on a small scale (about half an hour)
	$(BIN)/recbole-llm compare --config_files=properties/compare/quick.yaml

test: .venv/.ready-dev ## set up with the test tools, then run the tests: two at a time, then those that measure time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not alone and not faults"
	$(BIN)/python -m pytest -q -m alone

test-faults: .venv/.ready-dev ## kills, faults and fuzzed inputs, the long ones too, and how many were survived (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "faults or injects"

test-bounds: ## some tests with the lowest and the newest versions of what we need, in .venv-bounds (minutes)
	scripts/test_bounds.sh "$(PYTHON)"

coverage: .venv/.ready-dev ## the tests with what they cover of recbole_llm; fails under 90 % (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not alone and not faults" --cov=recbole_llm

lint: .venv/.ready-dev ## look for mistakes and wrong types without running anything
	$(BIN)/ruff check .
	$(BIN)/python -m mypy

lock: .venv/.ready-dev .venv-release/.ready ## write what .venv holds to requirements/lock.txt, with hashes
	scripts/lock.sh

audit: .venv-release/.ready ## look up known vulnerabilities of what requirements/lock.txt names
	.venv-release/bin/pip-audit --strict --require-hashes --disable-pip -r requirements/lock.txt

sbom: .venv-release/.ready ## dist/sbom.json: what a release stands on (CycloneDX), from requirements/lock.txt
	mkdir -p dist
	.venv-release/bin/cyclonedx-py requirements --output-reproducible --of JSON -o dist/sbom.json requirements/lock.txt

# Files of properties/compare, each laid over the one before, and a folder of results.
compare = $(BIN)/recbole-llm compare --jobs=$(JOBS) --config_files="$(1:%=properties/compare/%.yaml)" --out=results/$(2)
# The lines of full-llm-ml-100k.yaml that rank by themselves.
FULL_LLM = "--models=Pop,ItemKNN,EASE,BPR,LLMRanker,LLMRanker[loss=DPO,rejected_num=1,preference_learning_rate=0.0003,beta=1.0],LLMRanker[loss=DMPO,preference_learning_rate=0.0003,beta=1.0],LLMRanker[loss=SDPO,preference_learning_rate=0.0003,beta=1.0],LLMRanker[loss=RosePO,rejected=self_hard+semantic+popularity,smoothing=0.2,preference_learning_rate=0.0001,beta=1.0]"

results: .venv/.ready ## the main tables of results/ (days on two cores; what is finished is kept): make results DATA=<folder with amazon-games/> JOBS=2
	@test -d "$(DATA)/amazon-games" || { echo 'make results: DATA=<the folder that holds amazon-games/>' >&2; exit 2; }
	$(call compare,few-shot-games,few-shot-games) --data_path=$(DATA)
	$(call compare,few-shot-games losses-games,losses-games) --data_path=$(DATA)
	$(call compare,few-shot-games losses-games losses-prompt-games,losses-prompt-games) --data_path=$(DATA)
	$(call compare,few-shot-games losses-games losses-games-uni99,losses-games-uni99) --data_path=$(DATA)
	$(call compare,few-shot-games few-shot-games-uni99,few-shot-games-uni99) --data_path=$(DATA)
	$(call compare,few-shot-games prompts-games,prompts-games) --data_path=$(DATA)
	$(call compare,few-shot-games rosepo-games,rosepo-games) --data_path=$(DATA)
	$(call compare,few-shot-ml-100k,few-shot-ml-100k)
	$(call compare,few-shot-ml-100k losses-ml-100k,losses-ml-100k)
	$(call compare,few-shot-ml-100k rosepo-ml-100k,rosepo-ml-100k)
	$(call compare,few-shot-ml-100k rosepo-seeds,rosepo-seeds)
	$(call compare,few-shot-ml-100k rosepo-seeds full-ranking-losses,full-ranking-losses)
	$(call compare,few-shot-ml-100k full-ranking-few-shot,full-ranking-few-shot)
	$(call compare,full-ml-100k,full-ml-100k)
	$(call compare,full-ml-100k full-ranking-ml-100k,full-ranking-ml-100k)
	$(call compare,full-ml-100k full-llm-ml-100k,full-llm-ml-100k)
	$(call compare,full-ml-100k full-llm-ml-100k,full-llm-uni99) --modes=uni99 $(FULL_LLM)
	$(call compare,full-ml-100k full-llm-ml-100k,full-llm-seed1) --modes=uni99,full --seeds=1 $(FULL_LLM)
	$(call compare,transfer-to-games,transfer-to-games) --data_path=$(DATA)
	$(call compare,transfer-to-films,transfer-to-films) --data_path=$(DATA)
	$(call compare,model-size,model-size)
	$(call compare,dpo4rec dpo4rec-texts,dpo4rec-ml-100k)
	$(call compare,dpo4rec-few-shot,dpo4rec-few-shot)
	$(call compare,dpo4rec-full,dpo4rec-full)

bench: .venv/.ready-dev ## hold our speed against other ways to do it (hours; benchmarks/README.md)
	$(BIN)/python benchmarks/train_preference.py
	$(BIN)/python benchmarks/train_preference.py --memory --prompt 300 600 --k 7 15
	$(BIN)/python benchmarks/stream_training.py
	$(BIN)/python benchmarks/score_candidates.py
	$(BIN)/python benchmarks/full_catalogue.py --rounds=3
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/runner_overhead.py --rounds=3

clean: ## remove builds and caches; results in saved/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage*
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/.ready: setup.cfg scripts/setup_env.sh
	@scripts/setup_env.sh run "$(PYTHON)"

.venv/.ready-dev: setup.cfg scripts/setup_env.sh
	@scripts/setup_env.sh dev "$(PYTHON)"

.venv-release/.ready: requirements/release.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install -qq -r requirements/release.txt
	touch $@
