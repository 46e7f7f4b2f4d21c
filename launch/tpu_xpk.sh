#!/usr/bin/env bash
# Submits a run to a GKE cluster of TPUs that xpk made (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/tpu_xpk.sh --cluster=C --tpu-type=v5p-1024 --image=REGISTRY/v3jax:tpu --name=full \
#     --workdir=gs://bucket/full -- --exp=v3_full_v5p
#
# The image: docker build --build-arg EXTRA=tpu -t REGISTRY/v3jax:tpu . && docker push REGISTRY/v3jax:tpu
# --workdir is on storage that every host reaches. --project, --zone and --priority go to xpk as they
# are. --wait returns when the workload ends, --dry-run prints the command and submits nothing.
set -euo pipefail

fail() {
  echo "launch/tpu_xpk.sh: $1; usage: launch/tpu_xpk.sh --cluster=C --tpu-type=T --image=I --name=N --workdir=gs://... [--num-slices=S] [--project=P] [--zone=Z] [--priority=P] [--wait] [--dry-run] -- TRAIN_ARGUMENTS..." >&2
  exit 2
}

cluster='' tpu_type='' image='' name='' workdir='' num_slices=1 dry='' wait=''
place=() priority=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --cluster=?*) cluster=${1#*=} ;;
    --tpu-type=?*) tpu_type=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --name=?*) name=${1#*=} ;;
    --workdir=?*) workdir=${1#*=} ;;
    --num-slices=?*) num_slices=${1#*=} ;;
    --project=?* | --zone=?*) place+=("$1") ;;
    --priority=?*) priority=("$1") ;;
    --wait) wait=yes ;;
    --dry-run) dry=yes ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift
done
[[ ${1-} == -- && $# -gt 1 ]] || fail "nothing to train after --"
shift
for option in cluster tpu_type image name workdir; do
  [[ -n ${!option} ]] || fail "--${option//_/-}= is missing"
done
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "--name=$name: lower-case letters, digits and -, at most 40"
[[ $num_slices =~ ^[1-9][0-9]*$ ]] || fail "--num-slices=$num_slices is no number of slices"
[[ $workdir == gs://* ]] || fail "--workdir=$workdir: hosts share nothing but gs://"

# exec: the container's SIGTERM reaches pod.sh. --distributed: JAX asks the TPU pod who is where.
inside="exec bash /opt/v3jax/launch/pod.sh tpu$(printf ' %q' --distributed "--workdir=$workdir" "$@")"
command=(xpk workload create "--cluster=$cluster" "--workload=$name" "${place[@]}" "${priority[@]}"
  "--tpu-type=$tpu_type" "--num-slices=$num_slices"
  "--docker-image=$image" # the image as it is; --base-docker-image would build another on top
  --no-use-parallel-containers # one process a host, as the trainer counts them
  --max-restarts=100 # a host is lost every few hours at full size; each start continues the run
  --restart-on-exit-codes=1 # a lost peer ends the trainer with 1; 2, a mistake in the call, is final
  --termination-grace-period-seconds=600 # by default 30: too short to save 671B parameters
  "--command=$inside")
if [[ -n $dry ]]; then
  echo "${command[0]}$(printf ' %q' "${command[@]:1}")"
  exit
fi
command -v xpk >/dev/null || fail "no program 'xpk'; pip install xpk"
"${command[@]}"
if [[ -n $wait ]]; then
  xpk workload list "--cluster=$cluster" "${place[@]}" "--wait-for-job-completion=$name" --timeout=31536000
fi
