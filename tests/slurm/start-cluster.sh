#!/bin/bash
# Starts a Slurm of two nodes (n1 and n2, with pretended CPUs and GPUs) on this machine, as root:
# munge, slurmctld and two slurmd, without systemd or cgroups. FOLDER holds all of it; afterwards
# SLURM_CONF=FOLDER/slurm.conf. Needs the Debian packages slurm-wlm and munge. stop-cluster.sh FOLDER
# ends what this started.
set -euo pipefail
folder=${1:?usage: start-cluster.sh FOLDER}
host=$(hostname -s)
mkdir -p "$folder"/{state,spool,log}
install -d -m 0755 -o munge -g munge /run/munge
if [ ! -f /etc/munge/munge.key ]; then
    install -d -m 0700 -o munge -g munge /etc/munge
    dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 2>/dev/null
    chown munge: /etc/munge/munge.key
    chmod 400 /etc/munge/munge.key
fi
if ! munge -n >/dev/null 2>&1; then
    setpriv --reuid=munge --regid=munge --init-groups /usr/sbin/munged --force
    cat /run/munge/munged.pid >"$folder/munged.pid" # to be ended with the cluster
fi
# Ports of their own, so that clusters of several test runs do not meet.
base=$((7000 + $$ % 900 * 3))
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=60
KillWait=30
MinJobAge=300
InactiveLimit=0
JobRequeue=1
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 1)) CPUs=16 RealMemory=500000 Gres=gpu:8 Feature=fast State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((base + 2)) CPUs=16 RealMemory=500000 Gres=gpu:8 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=15 PreemptMode=REQUEUE
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
touch "$folder"/gpu{0..7} # Slurm wants a file for each GPU, whatever it is
echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF" -N n1
slurmd -f "$SLURM_CONF" -N n2
for _ in $(seq 100); do
    if [ "$(sinfo -h -N -p main -o %t 2>/dev/null | grep -c '^idle$')" = 2 ]; then exit 0; fi
    sleep 0.2
done
echo "the nodes did not become idle:" >&2
sinfo >&2 || true
tail -n 20 "$folder"/log/*.log >&2
exit 1
