# make pocket   set up, then take raw text to a chat-ready Llama      make test      set up, then lint, types and tests
# make test-all also the slow and peer-heavy tests                     make bench     every benchmark, one after the other
# make docs     rewrite docs/fields.md                                make sanitize  the compiled part under sanitisers
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip --disable-pip-version-check -q
NATIVE := CMakeLists.txt $(shell find native -type f)

.PHONY: setup setup-test pocket test test-all lint bench sanitize docs clean
.DEFAULT_GOAL := setup

setup: $(VENV)/.ready
setup-test: $(VENV)/.ready-test

# torch comes first and by exact version: whichever build of it is there already is kept.
$(VENV)/.ready: requirements.txt pyproject.toml $(NATIVE) $(VENV)/.modules
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	$(PIP) install -r requirements.txt
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

# An editable install knows the modules that were there when it was made: this file changes when the list does.
$(VENV)/.modules: FORCE
	@mkdir -p $(VENV); find src -name '*.py' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@
FORCE:

$(VENV)/.ready-test: $(VENV)/.ready requirements-test.txt
	$(PIP) install -r requirements-test.txt
	touch $@

pocket: setup
	$(BIN)/herd run recipes/pocket.yaml

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# In as many processes at a time; all tests of a file in one of them. Slow ones measure: they run alone.
WORKERS ?= 2
test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: lint
	$(BIN)/python -m pytest --all

# Those that are parts of others, or need another program's Python, are left out.
bench: setup-test
	@for script in $(filter-out %/shapes.py %/peer_worker.py %/native_vs_peers.py %/train_gpu_peer.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# The compiled part once more, with every memory access and all undefined behaviour checked: tests, and damaged files.
# All of the engine's tests but those of torch, and those that run nothing compiled in a process that has the sanitised
# module. Leaks are not looked for: Python itself leaves memory to the system at its end; a test counts what is resident.
SANITIZED := build/sanitize
FILES     ?= 100000
ASIDE     := cgroup imports native_amx paged_cache request sampler scheduler text
ASAN       = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
             ASAN_OPTIONS=detect_leaks=0 $(BIN)/python tests/fuzz/sanitized.py $(SANITIZED)/_native*.so
sanitize: setup-test
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DHERD_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python
	$(BIN)/cmake --build $(SANITIZED)
	$(ASAN) -p no:cacheprovider tests/engine tests/checkpoint/test_checkpoint_blocks.py \
	  $(ASIDE:%=--ignore=tests/engine/test_engine_%.py) -k "not [torch and not torch_backend"
	$(ASAN) --script tests/fuzz/engine_files.py --count $(FILES)

docs: setup
	$(BIN)/herd fields --markdown > docs/fields.md.new && mv docs/fields.md.new docs/fields.md

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
