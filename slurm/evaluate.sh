#!/bin/bash
# Figures of a run on one node of 8 GPUs: all make 50,000 samples, one judges them. As an array, each
# task takes one average of the run: sbatch --array=0-9%2 slurm/evaluate.sh. Requeued or
# submitted again, it makes only the images that are missing.
#SBATCH --job-name=diffmoe-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%A_%a.out
##SBATCH --account=YOURS --partition=YOURS
# Needs DIFFMOE_RUN, a run's folder or a checkpoint, and DIFFMOE_REFERENCE, what to compare it with.
# DIFFMOE_OUT: folder of samples and results, default evaluation/ and the run's name. Arguments are
# passed on to tools/evaluate.py, such as
# --num-samples 10000 --guidance 1 --extractor inception-2015-12-05.pt
source "${DIFFMOE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
run=${DIFFMOE_RUN:?set it to the folder of the run to evaluate}
reference=${DIFFMOE_REFERENCE:?set it to a reference, see tools/evaluate.py --help}
out=${DIFFMOE_OUT:-evaluation/$(basename "$run")}
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    averages=("$run"/ema-*/)
    [ -d "${averages[0]}" ] || averages=("$run"/step-*/)
    if ((SLURM_ARRAY_TASK_ID >= ${#averages[@]})) || [ ! -d "${averages[0]}" ]; then
        echo "error: array task $SLURM_ARRAY_TASK_ID: $run has no average of this number;" \
            "submit with --array=0-$((${#averages[@]} - 1))" >&2
        exit 2
    fi
    run=${averages[SLURM_ARRAY_TASK_ID]%/}
    out=$out/$(basename "$run")
fi
diffmoe_tool "$out" tools/evaluate.py "$run" --num-samples 50000 --reference "$reference" \
    --out "$out" "$@"
