# For a fresh machine: `make quickstart` and `make test`. Every target that needs .venv makes it first.
PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test test-slow lint benchmark tables docs release-check clean

quickstart: .venv/installed ## train on generated shapes, evaluate, draw
	$(BIN)/python train.py experiment=quickstart run_dir=$(RUN) trainer.resume=auto
	$(BIN)/python evaluate.py checkpoint=$(RUN)/checkpoints/best.pt run_dir=$(RUN)/best overwrite=true
	$(BIN)/python predict.py checkpoint=$(RUN)/checkpoints/best.pt source=generated/shapes/val output=$(RUN)/pictures \
		run_dir=$(RUN)/pictures threshold=0.3 enlarge=true overwrite=true
	@echo
	@echo "Metrics:             $(RUN)/best/evaluation/metrics.json"
	@echo "Pictures with boxes: $(RUN)/pictures"
	@echo "Curves:              $(BIN)/tensorboard --logdir $(RUN)"

test: .venv/installed ## one process for each core
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

benchmark: .venv/installed
	$(BIN)/python benchmarks/run.py

tables: .venv/installed ## of README and docs, from benchmarks/results.json
	$(BIN)/python -m cogapp -r -P -p "from docs.tables import show" README.md docs/*.md

docs: .venv/installed ## the site, in site/
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test,parity,dev,sweep,timm,huggingface,examples,video,supervision,export,serve]'
	touch $@

release-check: .venv/installed ## what training computes, against the last tag
	$(BIN)/python tools/release_check.py

clean:
	rm -rf .venv runs generated site
