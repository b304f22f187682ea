#!/bin/bash
# Encode images to latents on one node with 8 GPUs; any number of GPUs shares the work. The
# autoencoder with a batch of 32 images needs a few GB per GPU. A requeued job resumes.
#SBATCH --job-name=diffmoe-encode
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=200G
#SBATCH --time=06:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=%x-%j.out
##SBATCH --account=YOURS --partition=YOURS
# Needs DIFFMOE_IMAGES, a folder of class folders or tars, and DIFFMOE_DATA, the data folder to
# write. Arguments go to tools/encode_latents.py, for example --vae stabilityai/sd-vae-ft-mse (or
# a local folder, if nodes have no network).
source "${DIFFMOE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
images=${DIFFMOE_IMAGES:?set it to the folder of images}
data=${DIFFMOE_DATA:?set it to the data folder to write}
diffmoe_tool "$data" tools/encode_latents.py --images "$images" --out "$data" "$@"
