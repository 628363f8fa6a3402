# make demo      train a small LLaMA on this machine, in eight processes, from text to a report
# make test      lint and test
# make install   .venv with the `megallama` command
# make test-layouts, make fuzz N=200   every layout against the reference; random combinations
# make chaos N=200 SEED=0   ranks killed at random while they train, save and recover; SIGTERMs,
#   SIGSTOPs and flipped bits: .venv/bin/python -m tests.chaos --help, and refused operations of
#   disks: .venv/bin/python -m tests.chaos.refusals --help
# make test-schedules   every pipeline schedule for p = 1..16, m = 1..64, v = 1..4
# make power-loss, make mutations, make pairs   checkpoints: cut anywhere, damaged anywhere, and
#                saved in one layout to be loaded in another
# make bench-cpu compare a training step with Hugging Face's, in one run
# make test-gpu, make bench-gpu   what needs a GPU, with PYTHON=python3 and without .venv
# make bench-kernels   the CPU kernels of csrc/ against their PyTorch references
# make bench-checkpoints   saving and loading, beside a raw copy and PyTorch's distributed checkpoints
# make bench-schedules   measured pipeline schedules beside the simulated ones
# make bench-network   how much communication is hidden, between two network namespaces (root)

# The paths of configs/cpu-tiny.yaml.
override RUN := runs/demo
override ONE := runs/demo-one-process
DATA := $(RUN)/data
MEGALLAMA := .venv/bin/megallama

.PHONY: demo train-demo install lint test chaos test-layouts test-schedules fuzz check-layouts \
	bench-cpu bench-kernels power-loss mutations pairs bench-checkpoints bench-schedules bench-network \
	test-gpu bench-gpu clean
.DELETE_ON_ERROR:

demo: train-demo $(ONE)/compared
	$(MEGALLAMA) report $(RUN) --against $(ONE)
	$(MEGALLAMA) generate $(RUN) --prompt "    def __init__(self" --tokens 60

train-demo: $(DATA)/corpus.idx
	$(MEGALLAMA) train configs/cpu-tiny.yaml --nproc 8 parallel.tensor=2 parallel.pipeline=2

# The same run in one process, for half a minute: 75 says that it was stopped by its time box. One
# thread, as each of the eight has: on busy cores two wait for each other (8 s a step, not 0.4).
$(ONE)/compared: | train-demo
	OMP_NUM_THREADS=1 $(MEGALLAMA) train configs/cpu-tiny.yaml run.name=$(notdir $(ONE)) \
		train.max_minutes=0.5 || test $$? = 75
	touch $@

# Each of these is written under a temporary name and renamed when whole, so a file that is there
# is finished.
$(DATA)/corpus.jsonl: | .venv/installed
	$(MEGALLAMA) data stdlib --out $@

$(DATA)/tokenizer.model: $(DATA)/corpus.jsonl
	$(MEGALLAMA) tokenizer train --input $< --vocab-size 2048 --out $@

$(DATA)/corpus.idx: $(DATA)/corpus.jsonl $(DATA)/tokenizer.model
	$(MEGALLAMA) data build --input $< --tokenizer $(DATA)/tokenizer.model --out $(DATA)/corpus

install: .venv/installed

INSTALLED_FROM := setup.py pyproject.toml constraints.txt launch/install.sh $(wildcard csrc/* csrc/*/*)

.venv/installed: $(INSTALLED_FROM)
	launch/install.sh
	touch $@

.venv/installed-test: $(INSTALLED_FROM)
	launch/install.sh test
	# Of Megatron-Core the tests use the token files alone, without the gigabytes that it needs.
	-.venv/bin/pip install --quiet --no-compile --no-deps --only-binary=:all: megatron-core==0.16.1
	touch .venv/installed $@

lint: .venv/installed-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# What computes alone first, with a third process for tests/slurm, which mostly waits; then what starts up
# to eight ranks a test, two files at a time (all of it at once: load 120, a third of it the system's).
test: lint
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder \
		tests/slurm tests/unit tests/reference tests/security
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile tests/dist tests/layouts tests/gpu

# N combinations of seed SEED; a failing one is printed as the command that repeats it.
N := 200
SEED := 0

test-layouts: .venv/installed-test
	.venv/bin/python -m tests.layouts --all

test-schedules: .venv/installed-test
	.venv/bin/python -m tests.schedules

fuzz: .venv/installed-test
	.venv/bin/python -m tests.layouts --fuzz $(N) --seed $(SEED)

check-layouts: .venv/installed-test
	.venv/bin/python -m tests.check --n $(N) --seed $(SEED)

power-loss: .venv/installed-test
	.venv/bin/python -m tests.chaos.power --n $(N) --seed $(SEED)

mutations: .venv/installed-test
	.venv/bin/python -m tests.mutations --n $(N) --seed $(SEED)

pairs: .venv/installed-test
	.venv/bin/python -m tests.chaos.pairs

chaos: .venv/installed-test
	.venv/bin/python -m tests.chaos --n $(N) --seed $(SEED)

bench-cpu: .venv/installed-test
	.venv/bin/python benchmarks/training_step.py --json benchmarks/results/training-step-cpu.json

bench-kernels: .venv/installed-test
	.venv/bin/python benchmarks/kernels_cpu.py --json benchmarks/results/kernels-cpu.json
	.venv/bin/python benchmarks/attention_cpu.py --json benchmarks/results/attention-cpu.json

bench-checkpoints: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/checkpoints.py \
		--json benchmarks/results/checkpoints-cpu.json

bench-schedules: .venv/installed-test
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/pipeline_schedules.py \
		--json benchmarks/results/pipeline-schedules.json

bench-network: .venv/installed-test
	.venv/bin/python benchmarks/overlap_network.py --only tensor --rounds 5 \
		--json benchmarks/results/overlap-tensor.json
	.venv/bin/python benchmarks/overlap_network.py --only data --rounds 5 \
		--json benchmarks/results/overlap-data.json

test-gpu:
	launch/gpu.sh test

bench-gpu:
	launch/gpu.sh bench

clean:
	rm -rf .venv runs build *.egg-info megallama/kernels/_native*
