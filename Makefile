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

.PHONY: quickstart test lint demo docs rust-test python-test bench-step wheel loom tsan fuzz bench-core constraints clean

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

# zig links against the old glibc, which the system's linker cannot; both stay out of .venv.
WHEELS ?= dist
PYTHONS ?= 3.10 3.11 3.12 3.13
TOOL := $(UV) tool run --quiet --constraints constraints.txt

wheel: $(VENV)/uv.stamp  ## a wheel for CPython >= 3.10 and glibc >= 2.17, checked under each of PYTHONS
	rm -f $(WHEELS)/pgrpo-*.whl
	$(TOOL) --with ziglang maturin build --release --locked --zig --compatibility manylinux2014 \
	  --out $(WHEELS)
	$(TOOL) auditwheel show $(WHEELS)/pgrpo-*.whl
	$(BIN)/python tests/wheel/run.py $(WHEELS) --pythons $(PYTHONS)

loom:  ## models of the lock-free table: every order of events up to a few preemptions
	RUSTFLAGS='--cfg loom' CARGO_PROFILE_DEV_OPT_LEVEL=3 CARGO_TARGET_DIR=target/loom \
	  cargo test --quiet --package pgrpo-core --lib models:: -- --nocapture

# Nightly has no instrumented standard library: what ThreadSanitizer gets wrong about it is suppressed.
tsan:  ## the tests with threads of the Rust core under ThreadSanitizer, if there is a nightly toolchain
	@if rustc +nightly --version >/dev/null 2>&1; then set -x; \
	  TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan/suppressions.txt halt_on_error=1" \
	  RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer' CARGO_TARGET_DIR=target/tsan \
	  cargo +nightly test --quiet --package pgrpo-core --lib --test concurrency \
	  --target x86_64-unknown-linux-gnu -- --test-threads=1; \
	else echo "make tsan: skipped, for there is no nightly toolchain (rustup toolchain install nightly)"; fi

# What a run finds goes to target/fuzz; rust/fuzz/corpus holds what every run begins with.
FUZZ_SECONDS ?= 20
CARGO_FUZZ := target/tools/bin/cargo-fuzz

$(CARGO_FUZZ):
	cargo install --quiet --locked --root target/tools --version 0.13.2 cargo-fuzz

fuzz:  ## arbitrary bytes as snapshots, and arbitrary batches, if there is a nightly toolchain
	@if rustc +nightly --version >/dev/null 2>&1; then $(MAKE) fuzz-snapshot fuzz-border; \
	else echo "make fuzz: skipped, for there is no nightly toolchain (rustup toolchain install nightly)"; fi

fuzz-%: $(CARGO_FUZZ)
	mkdir -p target/fuzz/corpus/$*
	PATH="$(abspath $(dir $(CARGO_FUZZ))):$$PATH" \
	  cargo +nightly fuzz run --fuzz-dir rust/fuzz --target-dir target/fuzz $* target/fuzz/corpus/$* \
	  rust/fuzz/corpus/$* -- -max_total_time=$(FUZZ_SECONDS) -malloc_limit_mb=64 \
	  -verbosity=0 -print_final_stats=1

bench-core: $(VENV)/train.stamp  ## the normalizer against NumPy, numba, torch and a dict; leave the machine alone meanwhile
	$(INSTALL) --editable '.[bench]'
	cargo bench --quiet --package pgrpo-core --bench targets -- $(CURDIR)/benches/results/core-native.json
	$(BIN)/python benches/core.py --native benches/results/core-native.json \
	  --out benches/results/core.json

constraints: $(VENV)/uv.stamp  ## renew constraints.txt
	{ echo "# Exact versions for development and CI, renewed by make constraints."; \
	  echo 'torch==2.13.0' | $(UV) pip compile --quiet --universal --python-version 3.10 --no-header \
	  --no-annotate --upgrade --constraint - --extra dev --extra bench --group wheel pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) target runs dist
