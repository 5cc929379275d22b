# `make run` shows what flashgau does, `make test` runs its tests; both need only python3 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test matrix lint types completeness docs kernels every-kernel check clean

run: $(INSTALLED)
	$(BIN)/flashgau demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The tests against other versions of PyTorch and Triton, in environments of their own (several GB): docs/matrix.md.
matrix:
	$(PYTHON) tests/matrix.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The installed wheel is what users get, so that is what is type-checked.
types: $(INSTALLED)
	rm -rf build/wheel build/types && mkdir -p build
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir build/wheel . ./wheels/*/
	for wheel in build/wheel/*.whl; do $(BIN)/python -m zipfile -e $$wheel build/types; done
	cd build && MYPYPATH=types ../$(BIN)/mypy --config-file ../pyproject.toml -p flashgau -m flashgau_transformers

# Needs pyright as well: .venv/bin/python -m pip install 'pyright[nodejs]'
completeness: types
	$(BIN)/python tests/completeness.py

docs: $(INSTALLED)
	$(BIN)/mkdocs build --strict

# Compiled code, without a GPU, in bf16: on sm_90 every kernel, its hot loops no worse than recorded; on other architectures
# heads of 128, but for the kernels of derivatives, which take as long as all others; and a part of it executed.
DERIVATIVES := tangent,second_statistics,second_dq,second_dk,second_dv,second_dbias
OTHERS := from flashgau import tables; print(*sorted(tables.shipped_kernels() - {tables.FUSED} - set("$(DERIVATIVES)".split(","))), sep=",")
LOOPS := $(BIN)/flashgau compile --loops --against bench/results/loops/sm_90.json
kernels: $(INSTALLED)
	$(LOOPS) --target sm_90 --dtype bf16
	$(LOOPS) --target sm_80,sm_100,gfx942 --dtype bf16 --shapes 128 --kernel "$$($(BIN)/python -c '$(OTHERS)')"
	$(BIN)/flashgau check --execute sm_80,sm_90 --quick

# All of it, for a release or a change to many kernels: every kernel, width and dtype on every architecture.
every-kernel: $(INSTALLED)
	$(LOOPS)

check: lint types test docs kernels

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .matrix build wheels/*/build dist site .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info wheels/*/*.egg-info
