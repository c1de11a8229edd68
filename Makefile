PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check bench install vision clean

demo: $(VENV)/installed
	$(BIN)/tightrope demo --out runs/demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/installed-dev
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python benchmarks/_rows.py

install: $(VENV)/installed

# torchvision and timm, for --model, beside the torch that is there
vision: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[vision]'

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# without their dependencies: whatever torch and numpy are there stay
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,ckks]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt huggingface_hub pyyaml
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps torchvision timm \
		torch-pruning onnx onnxruntime openvino protobuf ml_dtypes flatbuffers
	touch $@

clean:
	rm -rf $(VENV) runs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
