#!/usr/bin/env bash
# From a fresh clone to a picture of digits that a DiffMoE drew: installs into .venv, packs 5,000 real
# MNIST digits, trains the mnist recipe on 2 processes that share the experts, and samples.
# Environment: PYTHON (default python3), DIFFMOE_VENV (default .venv), DIFFMOE_RUN (default runs/mnist).
set -euo pipefail
cd "$(dirname "$0")/.."
run=${DIFFMOE_RUN:-runs/mnist}
source tools/install.sh mnist,train

[ -e data/mnist/manifest.json ] || python tools/prepare_data.py mnist --out data/mnist

# Started again after a break, training goes on where it stopped.
OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 train.py --config mnist \
    --ds_config deepspeed_configs/zero1.json parallel.expert_parallel=2 output="$run" "$@"

python tools/sample.py "$run" --classes 0,1,2,3,4,5,6,7,8,9 --per-class 20 --guidance 2 --steps 50 \
    --check-digits --out "$run/digits.png"
