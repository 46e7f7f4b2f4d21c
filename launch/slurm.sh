#!/usr/bin/env bash
#SBATCH --job-name=v3jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=TERM@300
# One process a node, which drives all of the node's GPUs. From the repository's root:
#
#   sbatch --nodes=256 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh --exp=v3_full_h100
#
# sbatch's options come before the script, the trainer's after it; the log of the job is
# slurm-<job>.log, that of a task slurm-<job>-<task>.log. 300 s before the time limit the trainer
# gets SIGTERM (--signal): it saves and says so, and the job queues itself again, as it does after a
# crash; but not after less than RETRY_AFTER (600) seconds of work, which would repeat itself for ever.
# After a node's failure or a preemption SLURM queues it again (--requeue). scancel saves and is final.
#
# IMAGE runs it in a container: a .sif file by apptainer, any other name by pyxis. The working
# directory is mounted. PYTHON names the interpreter, PLATFORM the settings of launch/env.sh.
set -euo pipefail

fail() {
  echo "launch/slurm.sh: $1" >&2
  exit 2
}

[[ -n ${SLURM_JOB_ID-} ]] || fail "runs under SLURM; usage: sbatch [--nodes=N --gpus-per-node=G --time=T] launch/slurm.sh TRAIN_ARGUMENTS..."
[[ $# -gt 0 ]] || fail "nothing to train; usage: sbatch [OPTIONS] launch/slurm.sh TRAIN_ARGUMENTS..."
root=${SLURM_SUBMIT_DIR:?} # the script itself runs from SLURM's spool
[[ -f $root/launch/env.sh ]] || fail "no launch/env.sh in $root; submit from the repository's root"
platform=${PLATFORM-}
if [[ -z $platform && -n ${SLURM_JOB_GPUS-}${SLURM_GPUS_ON_NODE-} ]]; then platform=gpu; fi
# shellcheck source=launch/env.sh
source "$root/launch/env.sh" "$platform"

# Process 0 is on the first node. A name that does not resolve is replaced by SLURM's address of it.
mapfile -t nodes < <(scontrol show hostnames "${SLURM_JOB_NODELIST:?}")
host=${nodes[0]}
if ! getent hosts "$host" >/dev/null; then
  host=$(scontrol show node "$host" | grep -oE 'NodeAddr=[^ ]+' | cut -d= -f2)
fi
# Jobs that share a host differ in the port; these lie above Linux's own choices.
export JAX_COORDINATOR_ADDRESS=$host:$((61440 + SLURM_JOB_ID % 4096))
export JAX_NUM_PROCESSES=${SLURM_NTASKS:-$SLURM_JOB_NUM_NODES}
echo "launch/slurm.sh: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID, $JAX_NUM_PROCESSES processes, coordinator $JAX_COORDINATOR_ADDRESS"

step=(--ntasks="$JAX_NUM_PROCESSES" --kill-on-bad-exit=1 --label
  --cpu-bind=none # the trainer spreads its own threads over the node
  --open-mode=append --output="$root/slurm-%j-%t.log")
command=("${PYTHON:-python}" -m v3jax.train "$@")
case ${IMAGE-} in
  '') ;;
  *.sif) command=(apptainer exec --nv --bind "$root" --pwd "$root" "$IMAGE" "${command[@]}") ;;
  *) step+=(--container-image="$IMAGE" --container-mounts="$root:$root" --container-workdir="$root") ;;
esac

# At the time limit only the tasks are signalled. When this shell is, someone wants the job to end.
cancelled=''
trap 'cancelled=yes' TERM
log=$root/slurm-$SLURM_JOB_ID-0.log
before=0
if [[ -f $log ]]; then before=$(wc -c <"$log"); fi
# shellcheck disable=SC2016 # the task expands it
srun "${step[@]}" bash -c 'export JAX_PROCESS_ID=$SLURM_PROCID; exec "$@"' task "${command[@]}" &
code=0
wait $! || code=$?
while [[ -n $cancelled ]] && kill -0 $! 2>/dev/null; do wait $! || code=$?; done

again=''
if [[ -z $cancelled && $code != 2 ]]; then # 2 is a mistake in the call
  if ((code)); then
    again="ended with code $code"
  elif tail -c "+$((before + 1))" "$log" | grep -q 'stopped by a signal'; then
    again="time is up" # the trainer ends with 0 both when it is done and when it was told to stop
  fi
fi
if [[ -n $again ]]; then
  ((code)) || code=1
  if ((SECONDS < ${RETRY_AFTER:-600})); then
    echo "launch/slurm.sh: $again after $SECONDS s, too soon to try again (RETRY_AFTER); the same command continues" >&2
  else
    echo "launch/slurm.sh: $again after $SECONDS s; queued again, to continue"
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 # SLURM ends this script while it sleeps
    echo "launch/slurm.sh: this job may not be queued again; the same command continues" >&2
  fi
fi
exit "$code"
