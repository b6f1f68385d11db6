# Each target sets up what it needs (scripts/setup): `make run` or `make test` is all a fresh machine takes.
# ARGS is passed on, as in: make run ARGS="--port 9000"     make test ARGS="tests/engine -k vae"
.DEFAULT_GOAL := help
.PHONY: help run test lint bench drills train eval doctor clean
BIN := .venv/bin
export PYTHON
# torch's own threads only get in each other's way here (see docs/architecture.md).
export OMP_NUM_THREADS ?= 1

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

run:  ## set everything up and serve the page at http://127.0.0.1:8080
	@scripts/setup run
	@$(BIN)/livebrush serve $(ARGS)

test:  ## set everything up and run the tests (half an hour on 2 slow cores)
	@scripts/setup test
	@$(BIN)/python -m pytest $(ARGS)

lint:  ## ruff and mypy --strict
	@scripts/setup test
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench:  ## measure this machine: the model by parts, the engine's passes, one page and two in a real Chromium
	@scripts/setup test
	@echo "== the model"; $(BIN)/python tests/bench/bench_model.py
	@echo "== the engine's passes: minutes of compiling"; $(BIN)/python tests/bench/bench_engine.py
	@echo "== one page"; $(BIN)/python tests/bench/bench_browser.py $(ARGS)
	@echo "== two pages"; $(BIN)/python tests/bench/bench_browser.py --sessions 2 $(ARGS)

drills:  ## break it and watch: an engine four times slower in mid-stream; a minute of mangled requests; bad networks; faults
	@scripts/setup test
	@$(BIN)/python tests/bench/drill_slowdown.py $(ARGS)
	@$(BIN)/python tests/bench/drill_fuzz.py
	@$(BIN)/python tests/bench/drill_network.py --seconds 6
	@$(BIN)/python tests/bench/drill_viewers.py --seconds 6 --players 3
	@$(BIN)/python tests/bench/drill_faults.py

train:  ## train the embedded model anew (hours; engine/training/DATA.md names the data)
	@scripts/setup train
	@$(BIN)/python -m engine.training.run $(ARGS)

eval:  ## judge the embedded model on people it never saw; figures into its card (ARGS="--quick": minutes, no card)
	@scripts/setup train
	@$(BIN)/python -m engine.training.evaluate $(ARGS)

doctor:  ## what this machine can do, and what is wrong with it
	@scripts/setup run
	@$(BIN)/livebrush doctor $(ARGS)

clean:  ## remove caches and build leftovers; .venv and training data stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
