#!/bin/bash
# 50,000 samples of a run on one node of 8 GPUs; any number of GPUs works, each makes its share. A
# GPU holds all weights (11.7 GB for XL-E16) and a batch of 50; with --expert-parallel 8 the GPUs
# share the experts. Requeued or submitted again, it makes only the images that are missing.
#SBATCH --job-name=diffmoe-sample
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
##SBATCH --account=YOURS --partition=YOURS
# Needs DIFFMOE_RUN, a run's folder or a checkpoint. DIFFMOE_OUT: folder of the samples, default
# samples/ and the run's name. Arguments are passed on to tools/sample.py, such as
# --num-samples 10000 --guidance 1.5
source "${DIFFMOE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
run=${DIFFMOE_RUN:?set it to the folder of the run to sample from}
out=${DIFFMOE_OUT:-samples/$(basename "$run")}
diffmoe_tool "$out" tools/sample.py "$run" --num-samples 50000 --out "$out" "$@"
