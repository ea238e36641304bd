# What people and CI run. Needs Python >= 3.10, a Rust toolchain and make; everything else is installed
# into .venv from the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
# Big activations would go back to the system after every step and be faulted in again.
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export HF_HUB_DISABLE_TELEMETRY = 1

UV := $(BIN)/python -m uv
INSTALL := $(UV) pip install --python $(BIN)/python --constraint constraints.txt
RUST := Cargo.toml Cargo.lock $(wildcard rust/*/Cargo.toml rust/*/src/*.rs rust/*/src/*/*.rs)

.PHONY: quickstart test lint demo docs rust-test python-test bench-step constraints clean

quickstart: $(VENV)/train.stamp  ## GRPO and P-GRPO on MovieLens with SmolLM2, on a CPU
	$(BIN)/pgrpo compare examples/movielens-100k.toml --estimators grpo,pgrpo --seeds 0 --out $(OUT)

demo: $(VENV)/train.stamp  ## GRPO and P-GRPO on generated personas, no downloads
	$(BIN)/pgrpo demo

test: rust-test python-test  ## all tests

rust-test:
	cargo test --quiet --workspace

python-test: $(VENV)/dev.stamp
	$(BIN)/pytest -q

lint: $(VENV)/dev.stamp  ## formatters, linters, types, layers
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	cd tests && $(abspath $(BIN))/python -m mypy.stubtest pgrpo._core
	$(BIN)/lint-imports

$(VENV)/uv.stamp:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	touch $@

# The core is compiled once for both; `train` is what a user installs, `dev` adds the tools.
$(VENV)/train.stamp: $(VENV)/uv.stamp pyproject.toml constraints.txt $(RUST)
	@echo "installing pgrpo and its packages (torch is large: a few minutes the first time)"
	$(INSTALL) --editable '.[train]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(INSTALL) --editable '.[dev]'
	touch $@

docs: $(VENV)/train.stamp  ## renew docs/config.md from the docstrings of the settings
	$(BIN)/python docs/generate_config.py

bench-step: $(VENV)/train.stamp  ## one optimisation step against TRL's
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python benches/step_vs_trl.py --new-tokens 8 --out benches/results/step_vs_trl-8.json
	$(BIN)/python benches/step_vs_trl.py --new-tokens 64 --trl-passes 4 \
	  --out benches/results/step_vs_trl-64.json

constraints: $(VENV)/uv.stamp  ## renew constraints.txt
	{ echo "# Exact versions for development and CI, renewed by make constraints."; \
	  echo 'torch==2.13.0' | $(UV) pip compile --quiet --universal --python-version 3.10 --no-header \
	  --no-annotate --upgrade --constraint - --extra dev --extra bench pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) target runs dist
