# Every target makes .venv by itself the first time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-all mutation serve chat lint tiny-qwen tiny-mixture tiny-latent tiny-heads tiny-adapters tiny-vision bench-cpu bench-cpu-real bench-gpu load-test grpc notebooks figures clean

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml setup_environment.py
	$(PYTHON) setup_environment.py

demo: setup
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 ch07_sglang_radix/demo_tp_radix.py

test: setup
	$(BIN)/python -m pytest -m "not thorough" --nbmake -n auto --dist worksteal tests notebooks

test-all: setup
	$(BIN)/python -m pytest --nbmake -n auto --dist worksteal tests notebooks

# do the tests bite? (SAMPLE changes of the product, one at a time; about 20 s each)
SAMPLE ?= 120
mutation: setup
	$(BIN)/python -m tests.mutation --sample $(SAMPLE)

serve: setup
	$(BIN)/python -m ch07_sglang_radix.launch_server

chat: setup
	$(BIN)/python -m ch07_sglang_radix.chat

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tiny-qwen: setup
	$(BIN)/python -m common.tiny_qwen.train

# the bundled model's sibling with experts; afterwards who goes where in it
tiny-mixture: setup
	$(BIN)/python -m common.tiny_qwen.upcycle
	$(BIN)/python -m common.tiny_qwen.routing

# the bundled model with latent attention
tiny-latent: setup
	$(BIN)/python -m common.tiny_qwen.to_latent

# what guesses ahead of the bundled model; afterwards how often each is right
tiny-heads: setup
	$(BIN)/python -m common.tiny_qwen.train_draft
	$(BIN)/python -m common.tiny_qwen.train_medusa
	$(BIN)/python -m common.tiny_qwen.train_eagle
	$(BIN)/python -m common.tiny_qwen.train_eagle --version 3
	$(BIN)/python -m common.tiny_qwen.acceptance

# its eyes: a vision tower, and the attention that looks at its rows
tiny-vision: setup
	$(BIN)/python -m common.tiny_qwen.train_vision

# LoRA adapters of it
tiny-adapters: setup
	$(BIN)/python -m common.tiny_qwen.train_adapters

bench-cpu: setup
	$(BIN)/python ch07_sglang_radix/benchmarks/bench_cpu.py

# MODEL: SmolLM2-135M, Qwen2.5-0.5B; afterwards README.md's table is made from the CSV
MODEL ?= SmolLM2-135M
bench-cpu-real: setup
	$(BIN)/python -m ch07_sglang_radix.benchmarks.bench_cpu_real --model $(MODEL)
	$(BIN)/python -m ch07_sglang_radix.benchmarks.bench_cpu_real --readme

# PART: kernels, small (0.5B and 0.6B), engines (the same two, by chapter 6 and 7 in turn), large (7B), large-tp2 (7B on two GPUs)
PART ?= kernels
bench-gpu: setup
ifeq ($(PART),kernels)
	$(BIN)/python -m common.kernels.bench_kernels
else ifeq ($(PART),engines)
	$(BIN)/python figures/compare_engines.py
else ifeq ($(PART),large-tp2)
	$(BIN)/torchrun --standalone --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_gpu --part large
else
	$(BIN)/python -m ch07_sglang_radix.benchmarks.bench_gpu --part $(PART)
endif

# 10,000 clients, 500 at once, of whom some leave and some send rubbish; then 10,000 made-up requests
load-test: setup
	$(BIN)/python -m ch07_sglang_radix.serving.load_test --requests 10000 --concurrency 500
	$(BIN)/python -m tests.ch07.serving.openapi_fuzz --cases 10000

# the Python of serving/grpc/sglang_scheduler.proto
grpc: setup
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. ch07_sglang_radix/serving/grpc/sglang_scheduler.proto

# runs the .py files and stores what they show in the .ipynb beside them
notebooks: setup
	for source in notebooks/*.py; do $(BIN)/jupytext --quiet --to ipynb --execute $$source; done

figures: setup
	$(BIN)/python figures/draw.py

clean:
	rm -rf .venv *.egg-info .pytest_cache .hypothesis .ruff_cache
