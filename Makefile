# make setup   one virtual environment per MPI: .venv/openmpi and .venv/mpich
# make demo    train with EASGD on 4 ranks, then plot
# make lint    ruff, mypy, codespell, shellcheck
# make check   set-up, lint, and the tests to run while working: one process, then 2 ranks under Open MPI, some on 3
# make test    set-up, lint, all tests: one process, then 1 to 5 ranks under Open MPI and MPICH
# make cluster-setup   as root on Debian or Ubuntu: SLURM and the system's Open MPI for tests/cluster, which make test
#              runs where they are installed (no daemon is started or enabled)
# make bench   the benchmarks, half an hour; docs/benchmarks/bench.md has all tables and plots (BENCH_RANKS=4 for the
#              comparison of methods, BENCH_MORE_RANKS="3 6" for the collectives)
# make bench-gpu   those on an NVIDIA GPU, ten minutes at most, without make setup; docs/benchmarks/gpu.md has all.
#              PYTHON=python3 has torch, CuPy and mpi4py, MPIRUN is its mpirun (default: that on PATH),
#              BENCH_GPU_PARTS="kernels exchange training" are the parts
# make docs   the generated pages of docs/
# make site   the documentation site in site/; it is built without a network, and every warning is an error
# make reproduce   published results, repeated with simulated workers, ten minutes; make reproduce-quick   small versions
# make dist    the wheel and the source archive in dist/, checked by twine
# make clean   remove what the others made, the environments included

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
OPENMPI := .venv/openmpi
MPICH := .venv/mpich
DEMO := runs/demo
DEMO_EPOCHS ?= 20
BENCH_RANKS ?= 4
BENCH_MORE_RANKS ?= 4 8
BENCH_OUT := runs/bench
SCRIPTS := $(wildcard jobs/*.sh jobs/*.sbatch jobs/*.pbs jobs/*.lsf jobs/*.flux benchmarks/network/*.sh) .ci/run

CLUSTER_PACKAGES := slurmctld slurmd slurm-client munge openmpi-bin libpmix-dev iproute2 util-linux

.PHONY: setup cluster-setup demo lint check test bench bench-gpu reproduce reproduce-quick docs site dist clean

setup: $(OPENMPI)/.ready $(MPICH)/.ready

# The linters and NVRTC are needed once only.
$(OPENMPI)/.ready: EXTRAS := openmpi,test,dev
$(MPICH)/.ready: EXTRAS := mpich,test

.venv/%/.ready: setup.py constraints.txt
	@"$(PYTHON)" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make setup needs Python 3.11 or later with venv and pip (Debian, Ubuntu: apt install python3-venv); choose one by make PYTHON=..." >&2; exit 1; }
	@[ -x .venv/$*/bin/pip ] || "$(PYTHON)" -m venv .venv/$*
	.venv/$*/bin/python -m pip install --quiet --root-user-action=ignore -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# policy-rc.d: Debian's packages would start their daemons. libpmix-dev has the libpmix.so that SLURM loads.
cluster-setup:
	@[ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || { echo "make cluster-setup needs root and apt" >&2; exit 1; }
	@policy=/usr/sbin/policy-rc.d; \
	if [ ! -e $$policy ]; then printf '#!/bin/sh\nexit 101\n' > $$policy; chmod +x $$policy; trap "rm -f $$policy" EXIT; fi; \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER_PACKAGES)

demo: $(OPENMPI)/.ready
	@rm -rf $(DEMO)
	VIRTUAL_ENV=$(CURDIR)/$(OPENMPI) jobs/local.sh 4 mpitrain train --algorithm easgd --data digits --model mlp --epochs $(DEMO_EPOCHS) --out $(DEMO)
	@$(OPENMPI)/bin/mpitrain report $(DEMO)
	@echo; echo "The plots and the report of this run:"; ls -1 $(DEMO)/*.png $(DEMO)/report.md

lint: $(OPENMPI)/.ready
	$(OPENMPI)/bin/ruff check .
	$(OPENMPI)/bin/ruff format --check .
	$(OPENMPI)/bin/mypy
	$(OPENMPI)/bin/codespell
	$(OPENMPI)/bin/shellcheck $(SCRIPTS)

check: $(OPENMPI)/.ready lint
	$(OPENMPI)/bin/python tests/run.py --tier check

test: setup lint
	$(OPENMPI)/bin/python tests/run.py

# What fails does not stop the others; the names come at the end. The hosts of between-* need root and Linux.
bench: setup
	@rm -rf $(BENCH_OUT); failed=; \
	record() { \
	    local name=$$1 mpi=$$2 began=$$SECONDS; shift 2; echo "== $$name"; \
	    VIRTUAL_ENV=$(CURDIR)/.venv/$$mpi $(OPENMPI)/bin/python -m benchmarks.pages.record $$name "$$@" || failed="$$failed $$name"; \
	    echo "== $$name: $$((SECONDS - began)) s"; \
	}; \
	record kernels openmpi $(OPENMPI)/bin/python -m benchmarks.micro.kernels --repeats 11; \
	for mpi in openmpi mpich; do \
	    python=.venv/$$mpi/bin/python; \
	    record collectives-$$mpi $$mpi jobs/local.sh 2 python -m benchmarks.micro.collectives --repeats 20; \
	    for n in $(BENCH_MORE_RANKS); do \
	        record collectives-$$mpi-$$n $$mpi jobs/local.sh $$n python -m benchmarks.micro.collectives --sizes 4K,4M --repeats 5 --no-gloo; \
	    done; \
	    record windows-$$mpi $$mpi jobs/local.sh 2 python -m benchmarks.micro.windows --most 64M --repeats 10; \
	    record startup-$$mpi $$mpi $$python -m benchmarks.micro.startup --repeats 3 --imports 3; \
	    record nodes-$$mpi $$mpi $$python -m benchmarks.network.nodes; \
	    if [ "$$(id -u)" = 0 ]; then \
	        record between-$$mpi $$mpi $$python -m benchmarks.network.hosts; \
	        record sums-$$mpi $$mpi $$python -m benchmarks.network.sums; \
	    fi; \
	done; \
	record steps-openmpi openmpi jobs/local.sh 2 python -m benchmarks.training.steps --repeats 5; \
	record steps-mpich mpich jobs/local.sh 2 python -m benchmarks.training.steps --model mlp --repeats 5; \
	record stragglers-openmpi openmpi jobs/local.sh 2 python -m benchmarks.training.stragglers; \
	record prediction-openmpi openmpi $(OPENMPI)/bin/python -m benchmarks.training.prediction --steps 1000; \
	if [ "$$(id -u)" = 0 ]; then \
	    record prediction-hosts-openmpi openmpi $(OPENMPI)/bin/python -m benchmarks.training.prediction --hosts 2 --ranks 4,2 --steps 1000; \
	fi; \
	record compare openmpi jobs/local.sh $(BENCH_RANKS) python benchmarks/compare.py --out $(BENCH_OUT); \
	$(OPENMPI)/bin/python -m benchmarks.pages.bench || failed="$$failed page"; \
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

bench-gpu:
	@MPIRUN="$(MPIRUN)" $(if $(filter file,$(origin PYTHON)),python3,"$(PYTHON)") -m benchmarks.gpu.run $(BENCH_GPU_PARTS)

# What the papers found, in simulated worlds: each script prints its criteria and draws a figure.
reproduce: $(OPENMPI)/.ready
	$(OPENMPI)/bin/python -m benchmarks.reproduce --out runs/reproduce

reproduce-quick: $(OPENMPI)/.ready
	$(OPENMPI)/bin/python -m benchmarks.reproduce --quick --out runs/reproduce-quick

site: $(OPENMPI)/.ready
	$(OPENMPI)/bin/mkdocs build --quiet

docs: $(OPENMPI)/.ready
	$(OPENMPI)/bin/mpitrain algorithms --markdown > docs/methods.md
	$(OPENMPI)/bin/python -m benchmarks.pages.reliability
	$(OPENMPI)/bin/python -m benchmarks.pages.reproductions
	$(OPENMPI)/bin/python -m benchmarks.pages.choosing

dist: $(OPENMPI)/.ready
	$(OPENMPI)/bin/python -m pip install --quiet --root-user-action=ignore build twine
	@rm -rf dist
	$(OPENMPI)/bin/python -m build --outdir dist .
	$(OPENMPI)/bin/twine check --strict dist/*

clean:
	rm -rf .venv build dist site *.egg-info $(DEMO) .mypy_cache .ruff_cache .hypothesis .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
