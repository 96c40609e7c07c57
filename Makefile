# `make train` and `make test` need Python ≥ 3.10 and make; the rest is installed into .venv on first use.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
ARGS ?=

.PHONY: train vanishing distributed test versions lint types mutants soak models bench figures docs gpu clean

train: $(VENV)/installed
	$(RUN) -m benchmarks.train $(ARGS)

# Networks of growing depth, watched: where their gradients vanish. Writes into benchmarks/results/.
vanishing: $(VENV)/installed
	$(RUN) -m benchmarks vanishing $(ARGS)

# DDP, FSDP2 and tensor parallelism in 2 and 4 processes, killed and resumed too: the losses must be those of one process.
distributed: $(VENV)/installed
	$(RUN) -m benchmarks distributed $(ARGS)

# The same tests three times: as they are, then with kernels in Triton's interpreter, and with the machine code of a GPU, executed.
test: lint
	$(RUN) -m pytest -n auto --dist worksteal $(ARGS)
	$(RUN) -m pytest -n auto --dist worksteal --kernels=interpreter $(ARGS)
	$(RUN) -m pytest -n auto --dist worksteal --kernels=ptx $(ARGS)

# The tests on each supported version of torch, Triton and Python, in environments below .nox/ of 5 GB each, for hours.
versions: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[versions]"
	$(RUN) -m nox $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Has every exported name a complete type? Pyright runs in node, which pip installs with it: only the first call needs a network.
types: $(VENV)/installed-types
	PATH="$(abspath $(VENV))/bin:$$PATH" PYTHONPATH=. $(RUN) -m pyright --verifytypes torch_sigmoid --ignoreexternal

# Do the tests notice a wrong line? 100 random ones, each in a copy of the checkout, for hours; a second call continues there.
mutants: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,mutants]"
	$(RUN) -m benchmarks mutants $(ARGS)

# Does anything grow? 10,000 calls of every operator, and as many steps of a watched training.
soak: $(VENV)/installed
	$(RUN) -m benchmarks soak $(ARGS)

# Models of transformers, timm, torchvision, diffusers and open_clip, trained as they are and replaced; only an install needs a network.
models: $(VENV)-models/installed
	$(VENV)-models/bin/python -m benchmarks models $(ARGS)

# Measures all that this machine can, into benchmarks/results/. `python -m benchmarks --help` lists the parts.
bench: $(VENV)/installed
	$(RUN) -m benchmarks $(ARGS)

# Draws every figure, and writes every table of benchmarks/README.md, from benchmarks/results/.
figures: $(VENV)/installed
	$(RUN) -m benchmarks figures $(ARGS)

# Builds the pages and the reference of every public name as a site, which needs no network; a warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)
	@echo "Read it with: $(RUN) -m http.server --directory build/site"

# On a machine with a GPU and torch: tests, exhaustive numerics, speed, host and memory, without an install.
OUT ?= runs/gpu
gpu:
	$(PYTHON) -m benchmarks gpu --out $(OUT) $(ARGS)

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable ".[train,test,bench,docs]"
	@# On all cores, where pip takes one; what is meant for another Python does not compile.
	@$(RUN) -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib > /dev/null || true
	touch $@

$(VENV)-models/installed: constraints-models.txt
	$(PYTHON) -m venv $(VENV)-models
	$(VENV)-models/bin/python -m pip install --quiet --disable-pip-version-check --requirement constraints-models.txt
	touch $@

$(VENV)/installed-types: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[types]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-models .nox build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
