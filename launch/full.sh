#!/usr/bin/env bash
# The report's phases one after the other, each from the weights of the one before.
#
#   launch/full.sh --dry-run                                        # the plan
#   launch/full.sh --launcher=slurm --launch=--nodes=256 --launch=--gpus-per-node=8
#   launch/full.sh --exp=first.py --exp=second.py --launch=2        # your own, two processes here
#
# --exp       an experiment, or a file of your own; once a phase, in order. By default the phases of
#             the report that this tree registers.
# --launcher  local (launch/local.sh), slurm (launch/slurm.sh) or xpk (launch/tpu_xpk.sh)
# --launch    an option for it, once each; for local the number of processes, 1 by default
# --runs      the folder of the run directories, runs by default; gs://... for xpk
# What follows -- goes to the trainer of every phase.
#
# It stops at the first phase that does not finish. The same command starts again there: a phase is
# finished once its report.html exists, and is then passed over.
set -euo pipefail
set -m # a Ctrl-C in a terminal comes here alone and is passed on once

# Sections 4.2 (pre-training), 4.3 (32K, then 128K), 5.1 (SFT), 5.2 (RL). v3_rm, the reward model, is a
# side branch of v3_sft and no link of the chain.
chain=(v3_full v3_ctx32k v3_ctx128k v3_sft v3_grpo)

fail() {
  echo "launch/full.sh: $1" >&2
  exit "${2:-2}"
}

here=$(dirname "${BASH_SOURCE[0]}")
export PYTHON=${PYTHON:-python}
exps=() options=() launcher=local runs=runs dry=''
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --exp=?*) exps+=("${1#*=}") ;;
    --launcher=local | --launcher=slurm | --launcher=xpk) launcher=${1#*=} ;;
    --launch=?*) options+=("${1#*=}") ;;
    --runs=?*) runs=${1#*=} ;;
    --dry-run) dry=yes ;;
    *) fail "unknown option '$1'; usage: launch/full.sh [--exp=NAME]... [--launcher=local|slurm|xpk] [--launch=OPTION]... [--runs=DIR] [--dry-run] [-- TRAIN_ARGUMENTS...]" ;;
  esac
  shift
done
[[ ${1-} == -- ]] && shift
if ((${#exps[@]} == 0)); then
  listed=$("$PYTHON" -m v3jax.train --list) || fail "'$PYTHON -m v3jax.train --list' failed; activate the environment or set PYTHON" 1
  for exp in "${chain[@]}"; do
    if grep -q "^$exp " <<<"$listed"; then exps+=("$exp"); else echo "not in this tree: $exp"; fi
  done
fi
if [[ $launcher == local && ${#options[@]} == 0 ]]; then options=(1); fi

# my/phase.py:fn -> fn, my/phase.py -> phase
name_of() {
  local name=${1##*/}
  name=${name##*:}
  echo "${name%.py}"
}

finished() {
  if [[ $1 == *://* ]]; then
    "$PYTHON" -c 'import sys; from etils import epath; sys.exit(not (epath.Path(sys.argv[1]) / "report.html").exists())' "$1"
  else
    [[ -f $1/report.html ]]
  fi
}

# The command that trains phase $1 in $2 with the rest as the trainer's arguments; it waits for the end.
plan() {
  local name=$1 dir=$2
  shift 2
  case $launcher in
    local) command=("$here/local.sh" "${options[@]}" -- "--workdir=$dir" "$@") ;;
    # singleton: a phase submitted twice waits for its first job instead of training beside it
    slurm) command=(sbatch --wait "--job-name=$name" --dependency=singleton "${options[@]}" "$here/slurm.sh" "--workdir=$dir" "$@") ;;
    xpk) command=("$here/tpu_xpk.sh" --wait "${options[@]}" "--name=${name//_/-}" "--workdir=$dir" -- "$@") ;;
  esac
}

command=() before=''
trap '[[ -z ${job-} ]] || kill -TERM "$job" 2>/dev/null' TERM INT HUP
for exp in "${exps[@]}"; do
  name=$(name_of "$exp")
  dir=${runs%/}/$name
  from=()
  if [[ -n $before ]]; then from=(--set "init_from=$before"); fi
  before=$dir
  plan "$name" "$dir" "--exp=$exp" "${from[@]}" "$@"
  if finished "$dir"; then
    echo "finished: $dir"
  elif [[ -n $dry ]]; then
    echo "${command[0]}$(printf ' %q' "${command[@]:1}")"
  else
    echo "start: $dir"
    "${command[@]}" &
    job=$! code=0
    wait "$job" || code=$?
    while kill -0 "$job" 2>/dev/null; do # a signal ended the wait, not the job
      code=0
      wait "$job" || code=$?
    done
    ((code == 0)) || fail "$name ended with code $code; the same command starts there again" "$code"
    finished "$dir" || fail "$name stopped before its end ($dir/report.html is not there); the same command continues" 1
  fi
done
[[ -n $dry ]] || echo "done: $before"
