#!/usr/bin/env bash
# What a container of launch/tpu_xpk.sh and launch/gke_jobset.yaml runs: the platform's settings, then
# the trainer. Kubernetes takes exit code 0 for done, but the trainer also ends with 0 after it saved
# because it was told to stop (an eviction, a maintenance): that is turned into 143, so that the
# JobSet starts again and the run continues.
#
#   launch/pod.sh gpu|tpu|cpu TRAIN_ARGUMENTS...
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "launch/pod.sh: usage: launch/pod.sh gpu|tpu|cpu TRAIN_ARGUMENTS..." >&2
  exit 2
fi
# A cloud's NCCL plugin brings settings of its own, without which it does not start; they come
# first. Google's A3 Mega (TCPXO) and A3 Ultra (gIB) mount these files.
for profile in /usr/local/nvidia/lib64/nccl-env-profile.sh /usr/local/gib/scripts/set_nccl_env.sh; do
  if [[ $1 == gpu && -f $profile ]]; then
    set +u
    # shellcheck disable=SC1090
    source "$profile"
    set -u
  fi
done
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh" "$1"
shift

told='' trainer=''
trap 'told=yes; [[ -z $trainer ]] || kill -TERM "$trainer" 2>/dev/null' TERM
"${PYTHON:-python}" -m v3jax.train "$@" &
trainer=$!
code=0
wait "$trainer" || code=$?
while [[ -n $told ]] && kill -0 "$trainer" 2>/dev/null; do
  code=0
  wait "$trainer" || code=$?
done
if [[ -n $told && $code == 0 ]]; then code=143; fi
exit "$code"
