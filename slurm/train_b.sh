#!/bin/bash
# DiffMoE-B-E16-Flow, batch 256, TF32, on one node of 8 GPUs:
#   python tools/plan.py --recipe b_e16 --nodes 1 --expert-parallel 8 --zero-stage 2
# says 11.6 GB per GPU and 0.043 s per step at best, so 700,000 steps need over 8 hours; the job
# requeues itself every 24. 200 GB of host memory are enough for 8 ranks, their copies for saving,
# and the data workers.
# Append settings: sbatch slurm/train_b.sh training.precision=bf16 (see also common.sh)
#SBATCH --job-name=diffmoe-b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
##SBATCH --account=YOURS --partition=YOURS
source "${DIFFMOE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
diffmoe_train diffmoe_b_e16_flow parallel.expert_parallel=8 parallel.zero_stage=2 "$@"
