# make setup: install everything into .venv and build the op; make demo: train and evaluate a small model; make test.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test
setup: .venv/op

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

# Without a compiler this prints what is missing, and the model runs on the fallback.
.venv/op: .venv/installed setup.py $(wildcard csrc/*)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# With a fifth map, C2: a quarter of the shapes are smaller than two cells of C3.
DEMO = --num-levels 5 --loss-points 256 --train-scale 1 1 --workers 0 \
	--epochs 11 --eval-every 6 --lr 0.002 --milestones 1225 1335
# With these, glibc keeps what a step frees below 16 MB for the next step; the system would clear it page by page.
KEEP = MALLOC_MMAP_THRESHOLD_=16777216 MALLOC_TRIM_THRESHOLD_=1099511627776

demo: setup
	$(KEEP) $(BIN)/python train.py --output runs/demo $(DEMO) --resume
	$(BIN)/python eval.py --checkpoint runs/demo/checkpoint.pt --per-layer --output runs/demo/eval.json
	$(BIN)/python predict.py --checkpoint runs/demo/checkpoint.pt --output runs/demo/predictions runs/shapes/images/val2017

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
