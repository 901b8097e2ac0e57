PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: test demo lint format clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: a range that another package asks for would fetch another build of it
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	$(VENV)/bin/python -m pytest

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(READY)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh examples/demo.sh

clean:
	rm -rf $(VENV) build *.egg-info demo-output
