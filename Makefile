# Everything a person needs of this checkout. `make demo` and `make test` do their whole set-up themselves.
PYTHON ?= /usr/bin/python3
CLANG ?= clang-19
VENV := .venv
BIN := $(VENV)/bin
PB := migrator/_pb/migrator_pb2.py
BPF := datapath/bpf/switch.bpf.o
BPF_SOURCES := $(wildcard datapath/bpf/*.bpf.c datapath/bpf/lib/*.h)
LOCK := hooks/lock/migrator.so
LOCK_SOURCES := $(wildcard hooks/lock/*.[ch])
TEST_SOURCES := $(wildcard tests/libvirt/guest/*.[ch] tests/fuzz/*.c)
TESTS := tests/unit tests/model tests/fuzz tests/contract tests/bpf
LONG_TESTS := tests/soak
BPF_FLAGS := -O2 -g -mcpu=v3 -target bpf -Wall -Werror -Idatapath/bpf -I/usr/include/$(shell uname -m)-linux-gnu

.PHONY: help setup packages test model matrix matrix-qemu soak fuzz lint demo bench build generate bpf lock-driver clean lock format audit test-% test-oldest-kernel bpf-coverage

help:  ## this list
	@sed -n 's/^\([a-z%-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: packages $(VENV)/.installed $(PB) $(BPF) $(LOCK)  ## packages, virtual environment, generated code, BPF programs, lock driver

packages:
	@tools/packages

$(VENV)/.installed: requirements.lock pyproject.toml | packages
	@echo "setting up $(VENV) from requirements.lock"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@MIGRATOR_SKIP_BPF=1 $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(PB): proto/migrator/v1/migrator.proto tools/genproto.py $(VENV)/.installed
	@echo "generating RPC code from $<"
	@$(BIN)/python tools/genproto.py
	@touch $@

$(BPF): $(BPF_SOURCES) | packages
	@echo "compiling $@"
	@$(CLANG) $(BPF_FLAGS) -c datapath/bpf/switch.bpf.c -o $@

$(LOCK): $(LOCK_SOURCES) tools/lock_driver | packages
	@echo "compiling $@"
	@tools/lock_driver $@

generate: $(PB)  ## RPC code

bpf: $(BPF)  ## BPF programs

lock-driver: $(LOCK)  ## libvirt's lock driver of strict mode

test: setup  ## all tests (root)
	@$(BIN)/python tools/run_tests.py $(TESTS) --meanwhile $(LONG_TESTS) --after tests/libvirt --after tests/netns $(if $(WORKERS),--workers $(WORKERS)) -- $(ARGS)

test-%: setup  ## the tests of one folder: make test-unit, test-bpf, test-netns, test-libvirt
	@$(BIN)/python tools/run_tests.py tests/$* $(if $(filter libvirt,$*),--workers 1) -- $(ARGS)

model: setup  ## search the exhaustive model within its larger budgets too, and print the tables of docs/reliability.md
	@$(BIN)/python -m tests.model $(ARGS)

soak: setup  ## an hour of random moves, changes and faults against a reference model (root); SOAK_MINUTES=, SEED=, STEPS=, ONLY=3,7
	@$(BIN)/python -m tests.soak.run $(if $(SEED),--seed $(SEED)) $(if $(STEPS),--steps $(STEPS)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(SOAK_MINUTES),--minutes $(SOAK_MINUTES))

matrix: setup  ## the whole crash matrix, and its table in docs/reliability.md (root; hours); MATRIX=cover or 2/151 for a part, MORE=1 adds it
	@mkdir -p .cache $(if $(MORE),,&& rm -f .cache/matrix.jsonl)
	-@MATRIX=$(or $(MATRIX),full) MATRIX_RESULTS=.cache/matrix.jsonl $(BIN)/python -m pytest tests/netns/test_matrix.py -q $(ARGS)
	@tools/crash_matrix.py .cache/matrix.jsonl

matrix-qemu: setup  ## the same with a QEMU guest that libvirt moves; MATRIX=steps, cover or 2/400 for a part, MORE=1 adds it
	@mkdir -p .cache $(if $(MORE),,&& rm -f .cache/matrix-qemu.jsonl)
	-@MATRIX=$(or $(MATRIX),full) MATRIX_RESULTS=.cache/matrix-qemu.jsonl $(BIN)/python -m pytest tests/libvirt/test_matrix.py -q $(ARGS)
	@tools/crash_matrix.py --qemu .cache/matrix-qemu.jsonl

test-oldest-kernel: setup  ## the same on Linux 6.1 in an emulated machine, slowly: ARGS="tests/bpf -k uplink"
	@tools/oldest_kernel.py $(BIN)/python -m pytest -p no:cacheprovider $(or $(ARGS),tests/netns/test_driver_forward.py)

bpf-coverage: setup  ## which branches of the BPF programs the tests take (root); ARGS="--keep DIR" for llvm-cov
	@$(BIN)/python tools/bpf_coverage.py $(ARGS)

fuzz: setup  ## search for input that breaks a reader; FUZZ_SECONDS=60 for each target, T=one of them (root for T=packets)
	@$(BIN)/python -m tests.fuzz --seconds $(or $(FUZZ_SECONDS),60) $(T) $(ARGS)

demo: setup  ## move a VM between two hosts under traffic and show what happened (root); JSON=1, PLOT=file.svg
	@$(BIN)/migrator demo $(if $(JSON),--json) $(if $(PLOT),--plot $(PLOT))

bench: setup  ## measure; B=name for one
	@$(BIN)/python -m bench $(B) $(ARGS)

lint: setup  ## ruff, mypy, layers, C format, house rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/clang-format --dry-run --Werror datapath/bpf/*.bpf.c datapath/bpf/lib/*.h $(TEST_SOURCES) $(LOCK_SOURCES)
	@tools/houserules

format: setup  ## make the code look as lint wants it
	@$(BIN)/ruff check --fix-only --quiet . && $(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i datapath/bpf/*.bpf.c datapath/bpf/lib/*.h $(TEST_SOURCES) $(LOCK_SOURCES)

audit: setup  ## dependencies against the lock and PyPI's advisories (network)
	@tools/audit

build: setup  ## a wheel with compiled BPF programs and generated code, in dist/
	@rm -rf build dist/*.whl
	@$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	@ls -l dist/*.whl

lock:  ## resolve requirements.lock anew (needs uv)
	@uv pip compile --quiet --python-version 3.11 --extra dev --extra fuzz --generate-hashes --no-emit-index-url --no-header \
		pyproject.toml -o requirements.lock

clean:  ## remove what was built; keeps $(VENV)
	@rm -rf build dist migrator/_pb $(BPF) $(LOCK) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
