#!/bin/bash
# Ends what start-cluster.sh started with FOLDER, by its pid files.
folder=${1:?usage: stop-cluster.sh FOLDER}
export SLURM_CONF=$folder/slurm.conf
if [ -s "$folder/slurmctld.pid" ]; then
    timeout 20 scancel --user=root --signal=KILL --full 2>/dev/null
    timeout 20 scancel --user=root 2>/dev/null
    for _ in $(seq 50); do
        [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break
        sleep 0.2
    done
fi
for file in "$folder"/slurmd-n1.pid "$folder"/slurmd-n2.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [ -s "$file" ] && kill "$(<"$file")" 2>/dev/null
done
exit 0
