#!/bin/bash
# Encode images as latents on one node of 8 GPUs (or any number of nodes and GPUs). The autoencoder
# and a batch of 32 images need a few GB per GPU. If stopped, it resumes where it was.
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
# Needs DIFFMOE_IMAGES (class folders or tars) and DIFFMOE_DATA (the folder to write). Arguments go
# to tools/encode_latents.py: --vae stabilityai/sd-vae-ft-mse (or a folder, without network).
source "${DIFFMOE_HOME:-$SLURM_SUBMIT_DIR}/slurm/common.sh" || exit 2
images=${DIFFMOE_IMAGES:?set it to the folder of images}
data=${DIFFMOE_DATA:?set it to the data folder to write}
diffmoe_tool "$data" tools/encode_latents.py --images "$images" --out "$data" "$@"
