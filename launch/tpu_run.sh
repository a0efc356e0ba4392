#!/usr/bin/env bash
# Runs one command on all workers of a pod, and again after a preemption: see --help, docs/tpu.md.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/tpu_run.sh NAME [options] -- COMMAND
       launch/tpu_run.sh NAME --stop

Runs COMMAND on every worker of the pod NAME as one multi-host JAX job, shows worker 0's output, and
keeps every worker's in a file. The pod is set up first where it lacks this checkout.

  launch/tpu_run.sh pod -- python -m memphis_jax train --config /mnt/memphis/cot/config.json \
      --phase sft --workdir /mnt/memphis/cot/sft --data /mnt/memphis/cot/data \
      --init /mnt/memphis/cot/init

As the place of a run's stages:  memphis rounds ... --config.executor.train="launch/tpu_run.sh NAME --"

COMMAND's first word is an interpreter, replaced by the workers' own. All paths must be absolute, on
the mounted bucket. Each worker finds JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID (and
for several slices MEGASCALE_*) in its environment.

  --tries N       tries in a row without a new checkpoint before it gives up (default 5)
  --env NAME=V    a variable for the workers, as often as needed; MEMPHIS_BARRIER_SECONDS and
                  MEMPHIS_HEARTBEAT_SECONDS go along by themselves
  --log-dir DIR   where the workers' logs are kept (default ~/.memphis/tpu/NAME/logs)
  --stop          stop what runs there: SIGTERM (a checkpoint is saved), after 60 s SIGKILL
  --dry-run       print the commands, contact nobody
  -h, --help      this text

Exit codes 75 (preempted, a checkpoint was saved) and 76 (another host was lost), a lost connection and
a pod that is gone are answered by the same command again; a pod that is gone is deleted, requested and
set up first. Any other exit code ends this with the log of the worker that failed first.
kill -9 here, or a closed lid, leave the job running: the same command picks it up. Ctrl-C and SIGTERM
stop it. Exit code: 0, the command's own, or 75, 76, 255 when the tries are used up.
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_workers.sh"
# shellcheck source-path=SCRIPTDIR source=tpu_job.sh
source "$here/tpu_job.sh"

tries=5 logs='' only_stop='' as_is='' # --as-is: of tpu_setup.sh, on a pod that is not set up yet

parse_options() {
  local name_of
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      --as-is) as_is=yes && shift ;;
      --stop) only_stop=yes && shift ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --tries | --env | --log-dir)
        [[ $# -gt 1 && $2 != -- ]] || fail "$1 needs a value (see --help)"
        set_option "$1" "$2"
        shift 2
        ;;
      *) set_name "$1" && shift ;;
    esac
  done
  load_pod
  logs=${logs:-$pod/logs}
  for name_of in MEMPHIS_BARRIER_SECONDS MEMPHIS_HEARTBEAT_SECONDS; do
    [[ -z ${!name_of-} ]] || environment+=("$name_of=${!name_of}")
  done
  [[ -z $only_stop ]] || return 0
  (($# > 1)) || fail "no command: launch/tpu_run.sh $name -- COMMAND (see --help)"
  shift
  command=("$@")
  [[ -n $as_is ]] || check_command
}

set_option() {
  case $1 in
    --tries)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--tries $2 is not a number of 1 or more"
      tries=$2
      ;;
    --env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env $2: expected NAME=VALUE"
      environment+=("$2")
      ;;
    --log-dir) logs=$2 ;;
  esac
}

# The workers see this machine's files only on the mount.
check_command() {
  local word option='' given
  [[ ${command[0]} =~ (^|/)python[0-9.]*$ ]] ||
    fail "the command after -- must begin with an interpreter (python), not ${command[0]}"
  for word in "${command[@]:1}"; do
    given=$word
    [[ $word != --*=* ]] || option=${word%%=*} word=${word#*=}
    case $option in
      --workdir | --init | --data | --config) ;; # of the workers, be it there yet or not
      *) [[ $word == */* && -e $word ]] || word='' ;;
    esac
    option=$given
    [[ -n $word && $word != "$mount"/* ]] || continue
    [[ $word != *://* ]] || fail "$word: give $mount/NAME, where the bucket is mounted on the workers"
    fail "$word is not below $mount, so the workers do not see it: put it on the bucket, and give" \
      "absolute paths"
  done
}

# ------------------------------------------------------------------ the pod

# A pod that can run this: waits for one that comes, replaces one that is gone, sets it up.
ensure_pod() {
  local attempt process
  for ((attempt = 1; ; attempt++)); do
    have_pod
    [[ -z $as_is ]] || return 0
    on_all remote state "$mount"
    [[ -z $dry ]] || return 0
    if process=$(connection_lost); then
      ((attempt < tries)) || {
        say "no connection to $(label "$process"). What runs there goes on; the same command picks it up"
        exit 255
      }
      say "no connection to $(label "$process") yet"
      child "$tmp/none" sleep "$poll"
    elif any_running >/dev/null || all_have "$(stamp_of_checkout)"; then
      return 0
    elif ! child "$tmp/none" "$here/tpu_setup.sh" "$name"; then
      look
      if ((attempt >= tries)) || [[ $state == ready ]]; then
        fail "$name could not be set up"
      fi
    fi
  done
}

have_pod() {
  local attempt
  check_not_deleted
  wait_for_pod
  [[ $state == gone ]] || return 0
  say "$name: $why"
  for ((attempt = 1; ; attempt++)); do
    check_not_deleted
    ! child "$tmp/none" "$here/tpu_create.sh" "$name" --again --unless-deleted || break
    ((attempt < tries)) || fail "$name could not be had again"
    child "$tmp/none" sleep "$poll"
  done
  wait_for_pod
  [[ $state == ready ]] || fail "$name: $why"
}

# What changes when the run gets on: the names of its checkpoints.
progress() {
  local at folder
  for at in "${!command[@]}"; do
    case ${command[at]} in
      --workdir) folder=${command[at + 1]-} ;;
      --workdir=*) folder=${command[at]#*=} ;;
      *) continue ;;
    esac
    # Whole ones: orbax writes into folders of other names and renames them.
    [[ ! -d $folder/checkpoints ]] || find "$folder/checkpoints" -mindepth 1 -maxdepth 1 -regex '.*/[0-9]+' | sort
  done
}

# ------------------------------------------------------------------ trying

# After codes are in: 0 done; 1 again; ends the script for an error of the command.
judge() {
  local process code first='' again=''
  for process in "${order[@]}"; do
    code=${codes[process]}
    case $code in
      0) ;;
      75 | 76 | lost | gone) again=yes ;;
      *)
        if ((code >= 128)); then # killed: a host is lost
          again=yes
        else
          first=${first:-$process}
        fi
        ;;
    esac
  done
  [[ -n $first || -n $again ]] || return 0
  settle
  [[ -n $first && $state == ready ]] || return 1
  say "$(label "$first") failed with exit code ${codes[first]}; the end of its log," \
    "$(log_of "$first"):"
  tr '\r' '\n' <"$(log_of "$first")" | sed '/^$/d' | tail -n 20 >&2
  exit "${codes[first]}"
}

# A pod that is taken away gives its processes SIGTERM first: its state follows within a minute.
settle() {
  local looks=1
  [[ ! " ${codes[*]} " =~ \ (75|76)\  ]] || looks=4
  while ((looks-- > 0)); do
    look
    [[ $state == ready ]] || break
    ((looks == 0)) || child "$tmp/none" sleep "$poll"
  done
}

describe_codes() {
  local process who text='' reason='' memory="most often for lack of memory ('dmesg' there tells)"
  for process in "${order[@]}"; do
    who=$(label "$process")
    case ${codes[process]} in
      0) ;;
      75) text+=", $who was preempted and saved" ;;
      76) text+=", $who lost another one" && reason=${reason:-$(reason_in "$(log_of "$process")")} ;;
      lost) text+=", the connection to $who was lost" ;;
      gone) text+=", $who has lost its job: restarted, or all its processes killed, $memory" ;;
      137) text+=", $who was killed by signal 9 (exit code 137), $memory" ;;
      *) text+=", $who was killed (exit code ${codes[process]})" ;;
    esac
  done
  [[ $reason != *"signal 9" ]] || reason+=", $memory"
  printf '%s' "${reason:+$reason; }${text:2}" | cut -c 1-400
}

# What a guard said of the process that was lost (hosts.py).
reason_in() { sed -n 's/^memphis: \(process .*\): all processes stop.*/\1/p' "$1" | tail -n 1; }

last_code() {
  case " ${codes[*]} " in
    *" 75 "*) echo 75 ;;
    *" lost "*) echo 255 ;;
    *) echo 76 ;;
  esac
}

main() {
  local try=0 before process
  parse_options "$@"
  open true
  lock_pod
  [[ -n $dry ]] || rm -f "$pod/deleted" # of before: this command was given after it
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  if [[ -n $only_stop ]]; then
    look
    [[ $state == ready ]] || fail "$name is not there: $why"
    on_all remote stop 60
    if process=$(not_reached); then
      fail "$(label "$process") cannot be reached: what runs there may go on. Give the same command again"
    fi
    say "nothing runs on $name"
    return
  fi
  while true; do
    before=$(progress)
    until ensure_pod && find_job; do :; done
    run_job
    if [[ -n $dry ]] || judge; then
      return
    fi
    [[ -z $as_is ]] || exit 1
    try=$((try + 1))
    if [[ $(progress) != "$before" ]]; then
      try=0
    fi
    say "$(describe_codes)"
    if ((try >= tries)); then
      say "gave up after $try tries without a new checkpoint; logs: $logs. The same command goes on"
      exit "$(last_code)"
    fi
    say "running the same command again (try $((try + 1)) of $tries)"
  done
}

main "$@"
