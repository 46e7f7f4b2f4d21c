#!/usr/bin/env bash
# N processes of one run on this host: the programs of a cluster, tried on a desk.
#
#   launch/local.sh 2 --exp=v3_tiny --set mesh.data=2
#
# Each line of output carries its process's number. SIGTERM and Ctrl-C reach every process once, so
# that they save together; a second one ends them at once. When one fails the others are ended.
# GPUs are dealt out evenly. PYTHON names the interpreter; GRACE is how many seconds (300) the
# processes may take to save before they are killed, PLATFORM which settings of launch/env.sh to take.
# shellcheck disable=SC2317 # functions that traps call
set -euo pipefail
set -m # every process leads a group: Ctrl-C in a terminal comes here alone and is passed on once

usage() {
  echo "launch/local.sh: ${1}; usage: launch/local.sh N [--] TRAIN_ARGUMENTS..." >&2
  exit 2
}

n=${1-}
[[ $n =~ ^[1-9][0-9]*$ ]] || usage "'$n' is no number of processes"
shift
[[ ${1-} == -- ]] && shift
[[ $# -gt 0 ]] || usage "nothing to train"
python=${PYTHON:-python}
grace=${GRACE:-300}
command -v "$python" >/dev/null || usage "no program '$python'; activate the environment or set PYTHON"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/env.sh
source "$root/launch/env.sh" "${PLATFORM-}"

# The GPUs of process $1, none named when there are none to share.
gpus() {
  local all=()
  if [[ -n ${CUDA_VISIBLE_DEVICES-} ]]; then
    IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t all < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
  fi
  local each=$((${#all[@]} / n))
  if ((each > 0)); then (IFS=, && echo "${all[*]:$1*each:each}"); fi
}

numbered() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

port=$("$python" -c 'import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')
pipes=$(mktemp -d)
pids=() started=() readers=()
deadline=0 code=0

signal_all() {
  local pid
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}

# From now on $1 seconds remain.
end_within() {
  local by=$((SECONDS + $1))
  if ((deadline == 0 || by < deadline)); then deadline=$by; fi
}

stop() {
  signal_all TERM
  end_within "$grace"
}

# Kills what is left, data workers included, and waits for the last lines.
clean_up() {
  local pid
  trap '' TERM INT HUP
  for pid in "${started[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  wait "${started[@]}" "${readers[@]}" 2>/dev/null || true
  rm -rf "$pipes"
}

trap clean_up EXIT
trap stop TERM INT HUP
for ((i = 0; i < n; i++)); do
  mkfifo "$pipes/$i"
  numbered "$i" <"$pipes/$i" &
  readers+=($!)
  (
    mine=$(gpus "$i")
    if [[ -n $mine ]]; then export CUDA_VISIBLE_DEVICES=$mine; fi
    export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$n JAX_PROCESS_ID=$i
    exec "$python" -m v3jax.train "$@"
  ) </dev/null >"$pipes/$i" 2>&1 &
  pids+=($!) started+=($!)
done

exec 3>&2 2>/dev/null # bash would report every process that a signal ended, source and all
while ((${#pids[@]})); do
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
    else
      ended=0
      wait "$pid" || ended=$?
      if ((ended && !code)); then
        code=$ended
        echo "launch/local.sh: a process ended with code $code; ending the others" >&3
        failed=yes
      fi
    fi
  done
  pids=("${alive[@]}")
  if [[ -n ${failed-} ]]; then # the others wait for it and cannot save; the trainer itself takes up to 10 s
    failed=''
    signal_all TERM
    end_within 15
  fi
  if ((deadline && SECONDS >= deadline && ${#pids[@]})); then
    echo "launch/local.sh: ${#pids[@]} processes did not end in time; killed" >&3
    signal_all KILL
    ((code)) || code=137
  fi
  ((${#pids[@]} == 0)) || sleep 0.2
done
exit "$code"
