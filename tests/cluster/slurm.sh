#!/bin/sh
# A Slurm of one node in a folder, for tests. Needs root and Debian.
#   slurm.sh install      install slurmctld, slurmd, slurm-client and munge
#   slurm.sh start DIR    start it; then export SLURM_CONF=DIR/slurm.conf
#   slurm.sh stop DIR     end it
set -eu
if [ "$1" = install ]; then
    command -v slurmctld slurmd munged srun >/dev/null && exit 0
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge
    exit 0
fi
dir=$(mkdir -p "$2" && cd "$2" && pwd)
name=$(hostname -s)
stop() {
    for pid in "$dir"/slurmctld.pid "$dir"/slurmd.pid; do
        [ ! -s "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
    done
}
case $1 in
stop) stop; exit 0 ;;
start) ;;
*) echo "usage: slurm.sh install, or slurm.sh start|stop DIR" >&2; exit 2 ;;
esac
stop
mkdir -p "$dir/state" "$dir/spool" /run/munge
chown munge: /run/munge
[ -f /etc/munge/munge.key ] || mungekey --create
chown munge: /etc/munge/munge.key
munge -n </dev/null | unmunge >/dev/null 2>&1 || runuser -u munge -- /usr/sbin/munged --force
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
cat >"$dir/slurm.conf" <<CONF
ClusterName=holdfast
SlurmctldHost=$name
SlurmctldPort=${SLURM_PORT:-16817}
SlurmdPort=$((${SLURM_PORT:-16817} + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1000
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,batch_sched_delay=1,bf_interval=1,requeue_delay=1
SchedulerTimeSlice=5
MinJobAge=300
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=$name CPUs=4 RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$dir/slurm.conf"
slurmctld -c
slurmd
for _ in $(seq 60); do
    [ "$(sinfo --noheader --format %t 2>/dev/null)" = idle ] && exit 0
    sleep 0.5
done
echo "Slurm did not start; see $dir/slurmctld.log and $dir/slurmd.log." >&2
exit 1
