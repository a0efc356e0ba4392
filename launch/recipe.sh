#!/usr/bin/env bash
# The whole recipe on a TPU pod and a GPU host: see --help and docs/tpu.md.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/recipe.sh NAME --config FILE --workdir DIR [options] [--config.FIELD=VALUE ...]

The whole recipe with one command: creates the pod NAME where it is missing, sets it up, and runs `memphis
rounds` here with training on the pod and sampling on a GPU host. Started again after anything, it goes
on where it was; a pod that is preempted meanwhile is replaced.

  launch/recipe.sh pod --type v5litepod-16 --zone us-east5-b --bucket gs://me-memphis --spot \
      --config configs/memphis_cot.py --workdir /mnt/memphis/cot --gpu me@gpu1 --delete

  --config FILE    configs/*.py
  --workdir DIR    on the bucket, which must be mounted here too:
                   gcsfuse --metadata-cache-ttl-secs=0 BUCKET /mnt/memphis
  --gpu 'HOST ...' words for launch/gpu_generate.sh: sampling in vLLM there (docs/gpu.md).
                   Without it, samples are drawn where the config says (its executor and engine)
  --delete         delete the pod after a run that finished
  --dry-run        print the commands, contact nobody
  -h, --help       this text

Options of launch/tpu_create.sh (--type, --bucket, --spot, ...) are needed the first time only. What is
left goes to `memphis rounds`.
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_workers.sh"

config='' workdir='' gpu='' delete='' creation=() rest=()

parse_options() {
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      --delete) delete=yes && shift ;;
      --spot) spot=yes && creation+=("$1") && shift ;;
      --internal-ips) internal=yes && creation+=("$1") && shift ;;
      --config.*=*) rest+=("$1") && shift ;;
      --config.*)
        [[ $# -gt 1 ]] || fail "$1 needs a value (see --help)"
        rest+=("$1" "$2")
        shift 2
        ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --*)
        [[ $# -gt 1 ]] || fail "$1 needs a value (see --help)"
        set_option "$1" "$2"
        shift 2
        ;;
      *) set_name "$1" && shift ;;
    esac
  done
  [[ -n $name ]] || fail "no name: launch/recipe.sh NAME --config FILE --workdir DIR (see --help)"
  [[ -n $config ]] || fail "no --config: a file in configs/ (see --help)"
  [[ -f $config ]] || fail "--config $config: no such file"
  [[ -n $workdir ]] || fail "no --workdir: a folder on the mounted bucket (see --help)"
}

set_option() {
  case $1 in
    --config) config=$2 ;;
    --workdir) workdir=${2%/} ;;
    --gpu) gpu=$2 ;;
    *)
      pod_option "$1" "$2" || fail "unknown option $1 (see --help)"
      creation+=("$1" "$2")
      ;;
  esac
}

check_workdir() {
  [[ $workdir == "$mount"/?* ]] || fail "--workdir $workdir is not below $mount, where the bucket is" \
    "mounted on every worker: give $mount/NAME, or another --mount"
  [[ -z $dry ]] || return 0
  mountpoint -q "$mount" || fail "$mount is not mounted on this machine:$(dead_mount)" \
    "gcsfuse --metadata-cache-ttl-secs=0 ${bucket#gs://} $mount"
}

# A gcsfuse that died leaves a mount in the way of the next.
dead_mount() {
  [[ $(stat "$mount" 2>&1) != *"not connected"* ]] || printf ' fusermount -uz %q &&' "$mount"
}

run() {
  if [[ -n $dry && $1 != "$here"/tpu_* ]]; then
    shown "$@"
  else
    child "$tmp/none" "$@"
  fi
}

# In a dry run the scripts that follow tpu_create.sh find the options that it would have kept.
keep_for_dry_run() {
  export MEMPHIS_TPU_HOME=$tmp/home
  pod=$MEMPHIS_TPU_HOME/$name project=${project:-PROJECT} zone=${zone:-ZONE}
  save_pod
}

# All that this script started gets the signal: a job on the pod is stopped, after a checkpoint.
interrupted() {
  local one
  trap '' INT TERM
  kill_children
  for one in "$tmp/children"/*; do
    wait "${one##*/}" || true
  done
  exit "$1"
}

main() {
  local costs code=0 rounds path=$checkout${PYTHONPATH:+:$PYTHONPATH}
  parse_options "$@"
  if [[ -s $pod/options && ${#creation[@]} == 0 ]]; then
    load_pod
    creation=(--again)
  fi
  [[ $type =~ -[0-9]+$ ]] || fail "no --type: an accelerator type such as v5litepod-16 (see --help)"
  check_workdir
  costs="$name still runs and costs money: launch/tpu_delete.sh $name"
  open true
  [[ -z $dry ]] || keep_for_dry_run
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  run env PYTHONPATH="$path" "$(own_python)" "$here/check_config.py" "$config" \
    "$((slices * $(devices_of "$type")))" "${rest[@]}" || exit 1
  run "$here/tpu_create.sh" "$name" "${creation[@]}" ${dry:+--dry-run}
  run "$here/tpu_setup.sh" "$name" ${dry:+--dry-run} || code=$?
  ((code == 0)) || { say "$name could not be set up; $costs" && exit "$code"; }
  rounds=("$(own_python)" -m memphis_jax rounds --config "$config" --workdir "$workdir"
    "--config.executor.train=$(quoted "$here/tpu_run.sh" "$name" --)")
  [[ -z $gpu ]] || rounds+=(--config.generate.engine=vllm
    "--config.executor.generate=$(quoted "$here/gpu_generate.sh") $gpu --")
  run env PYTHONPATH="$path" "${rounds[@]}" "${rest[@]}" || code=$?
  case $code in
    0) ;;
    75 | 76 | 255)
      say "the run was interrupted (exit code $code): the same command goes on where it was." \
        "Meanwhile $costs"
      exit "$code"
      ;;
    *)
      say "memphis rounds failed (exit code $code); $costs"
      exit "$code"
      ;;
  esac
  [[ -n $dry ]] || say "finished: $workdir/report.html"
  if [[ -n $delete ]]; then
    run "$here/tpu_delete.sh" "$name" ${dry:+--dry-run}
  else
    say "$costs"
  fi
}

main "$@"
