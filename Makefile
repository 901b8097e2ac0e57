PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

NEWEST := .venv-newest
PEER := .peers/original

# Of `make fuzz`: which inputs.
SEED := 0
FIRST := 0

.PHONY: test test-slow test-failed test-newest fuzz soak test-browser test-ray test-comfyui chromium \
	demo bench peers dist lint format clean

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first: a range that another package asks for would fetch another build of it
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	# mypy sees the package as it is installed: kernels, profiles and bench are inside it
	@rm -rf .mypy && mkdir -p .mypy/omnigen_fast
	@cd .mypy/omnigen_fast && ln -s ../../omnigen_fast/* ../../kernels ../../profiles ../../bench .
	cd .mypy && ../$(VENV)/bin/mypy --config-file ../pyproject.toml

# A process for each core, each with one thread: most tests are too small for two.
PROCESSES := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# CPU seconds above which a test that is not slow fails. Most take less than one, none over 20 on the
# processors they were timed on; a slow or busy core takes up to three times as long for the same.
CPU_LIMIT := 60

# All but the slow tests: with the environment, within six minutes on two cores.
test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PROCESSES) --cpu-limit $(CPU_LIMIT) -m 'not slow'

# The others: tests/quick_tests.py.
test-slow: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PROCESSES) -m slow

# The folders of tests whose extra is installed.
OF_EXTRAS = $(if $(wildcard $(VENV)/.ready-browser),tests/browser) \
	$(if $(wildcard $(VENV)/.ready-ray),tests/on_ray)

# What failed of either, one after the other: some tests bound a time, which a busy machine exceeds.
test-failed: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --last-failed --last-failed-no-failures none \
		--cpu-limit $(CPU_LIMIT) tests $(OF_EXTRAS)

# With the newest PyTorch, built for CUDA, Triton, diffusers and transformers: calls on a GPU that is
# not there, and what depends on those versions. TESTS names other tests, as TESTS=tests for all.
VERSIONED := tests/fake_gpu tests/kernels/test_ahead.py tests/kernels/test_ops.py \
	tests/test_golden.py tests/test_equivalence.py tests/test_names.py tests/for_diffusers
test-newest: $(NEWEST)/.ready
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(PROCESSES) $(or $(TESTS),$(VERSIONED))

# Not constraints.txt: what is not named in constraints-newest.txt is the newest there is.
$(NEWEST)/.ready: setup.py pyproject.toml constraints-newest.txt
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --constraint constraints-newest.txt torch
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint constraints-newest.txt --editable '.[dev]'
	touch $@

# N inputs (of KIND, or of all kinds together) made by mutation, in a process for each core. Failing
# ones are in fuzz-output; RESULT names a file for the numbers.
fuzz: $(READY)
	PYTHONPATH=tests $(VENV)/bin/python -m fuzz --number $(or $(N),2250) --seed $(SEED) --first $(FIRST) \
		$(addprefix --kind ,$(KIND)) $(addprefix --result ,$(RESULT))

# N mixed requests on one pipeline, six requests again and again, memory that runs out at every
# allocation, and Ctrl-C at every line: half an hour. SOAK takes more options.
soak: $(READY)
	# oneDNN keeps 1,024 compiled products, 90 MB of bfloat16's shapes: that would hide a leak
	OMP_NUM_THREADS=1 ONEDNN_PRIMITIVE_CACHE_CAPACITY=16 LRU_CACHE_CAPACITY=16 PYTHONPATH=tests \
		$(VENV)/bin/python -m soak --requests $(or $(N),1000) $(SOAK)

# The page in a real browser, and its server under attack. What that takes on top is installed for
# them alone.
test-browser: chromium $(VENV)/.ready-browser
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile \
		tests/browser tests/page/test_server_attacks.py

$(VENV)/.ready-browser: $(READY)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[app,browser]'
	touch $@

# A batch and a server on Ray clusters of this machine, which the tests start and stop.
test-ray: $(VENV)/.ready-ray
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/on_ray

$(VENV)/.ready-ray: $(READY)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]'
	touch $@

# The nodes in a real ComfyUI: COMFYUI is its folder, and COMFYUI_PYTHON an interpreter that has both
# its requirements and this package.
test-comfyui: $(READY)
	OMP_NUM_THREADS=1 COMFYUI='$(COMFYUI)' COMFYUI_PYTHON='$(COMFYUI_PYTHON)' \
		$(VENV)/bin/python -m pytest tests/in_comfyui

chromium:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null || { \
			echo 'chromium is missing; install it, on Debian with:' \
				'sudo apt-get install chromium fonts-liberation' >&2; exit 1; }; \
		apt-get update --quiet --quiet && DEBIAN_FRONTEND=noninteractive apt-get install \
			--quiet --quiet --yes --no-install-recommends chromium fonts-liberation; }

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The small model that ships, on one sheet.
demo: $(READY)
	$(VENV)/bin/omnigen-fast demo --out demo-output/sheet.png

# The original package in an environment of its own: it needs an old transformers. Its torchvision
# and timm are left out, since nothing of them runs.
$(PEER)/.ready: bench/peers/original.txt constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(PEER)/bin/python -m pip install --quiet --constraint constraints.txt \
		--requirement bench/peers/original.txt
	$(PEER)/bin/python -m pip install --quiet --no-deps OmniGen==1.0.3
	touch $@
peers: $(PEER)/.ready

# The original's table of sizes for a small random model, in ten minutes on two CPU cores. A peer
# whose environment can't be built is a row that says so. BENCH takes more options.
bench: $(READY)
	-$(MAKE) peers
	$(VENV)/bin/omnigen-fast bench --steps 4 --repeat 3 $(BENCH)

# An sdist, and a wheel built from it, in dist/.
dist: $(READY)
	$(VENV)/bin/python -m build

clean:
	rm -rf $(VENV) $(NEWEST) .mypy .peers build dist *.egg-info demo-output fuzz-output
