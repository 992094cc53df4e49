# Each target does its own set-up: a virtual environment with pinned packages and the package
# itself, built like any ROS 2 package. Nothing is installed outside this directory.
#
#   make demo        the real node on real camera images, in the terminal, for about 20 s
#   make test        all tests
#   make test-jazzy  the ROS tests on ROS 2 Jazzy instead of Kilted
#   make test-nvrtc  the CUDA C++ kernels compile for Hopper GPUs (no GPU needed)
#   make lint        ruff and mypy
#   make env         only the set-up
#   make clean       remove the environments and everything that was built
#
# make PYTHON=python3.12 ...   another Python (3.10 or later)
# make demo CHECKPOINT=DIR     the demo with a checkpoint of your own
# make test PYTEST_ARGS='...'  more arguments for pytest

PYTHON ?= python3
DISTRIBUTION ?= kilted
VENV ?= .venv
CHECKPOINT ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
REQUIREMENTS := requirements/python.txt requirements/$(DISTRIBUTION).txt
# What is installed, and what describes it: when any of it changes, the package is rebuilt.
SOURCES := $(shell find pi05_ros msg config launch cmake test/data/libero_spatial_bowl \
                        -type f -not -path '*/__pycache__/*') \
           CMakeLists.txt package.xml setup.py pyproject.toml

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-jazzy test-nvrtc lint env clean lock
.DELETE_ON_ERROR:

demo: env
	$(BIN)/pi05-ros demo $(if $(CHECKPOINT),--checkpoint '$(CHECKPOINT)') $(DEMO_ARGS)

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

test-jazzy:
	$(MAKE) test VENV=.venv-jazzy DISTRIBUTION=jazzy PYTEST_ARGS="-m ros $(PYTEST_ARGS)"

test-nvrtc: env
	$(BIN)/python -m pip install --quiet -r requirements/nvrtc.txt
	$(BIN)/python -m pytest -n 2 test/engine/kernels/test_nvrtc.py $(PYTEST_ARGS)

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/mypy

env: $(VENV)/.installed

$(VENV)/.requirements: $(REQUIREMENTS)
	@sh requirements/check_host.sh '$(PYTHON)'
	@echo 'Setting up $(VENV): ROS 2 $(DISTRIBUTION), PyTorch and the rest, from the package index.'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --progress-bar off $(REQUIREMENTS:%=-r %)
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps --no-build-isolation .
	@touch $@

clean:
	rm -rf .venv .venv-jazzy build dist *.egg-info demo_output soak_output .pytest_cache .mypy_cache \
	    .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Write the lock files anew from requirements/*.in.
lock:
	$(PYTHON) -m venv build/uv
	build/uv/bin/pip install --quiet uv
	sh requirements/lock.sh "$(CURDIR)/build/uv/bin/uv"
