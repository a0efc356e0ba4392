#!/usr/bin/env bash
# Deletes a pod: see --help.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/tpu_delete.sh NAME [--force] [--dry-run]

Deletes the pod NAME, its request too, so that it costs nothing more. The bucket is left alone.
A pod on which a job runs is not deleted, unless --force: then the job is stopped first (SIGTERM, so
that a checkpoint is saved).
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_workers.sh"

main() {
  local force='' process
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      --force) force=yes && shift ;;
      *) set_name "$1" && shift ;;
    esac
  done
  load_pod
  open true
  look
  [[ $state != unknown || -n $force ]] || fail "whether a job runs on $name is not known ($why):" \
    "again later, or --force"
  if [[ $state == ready ]]; then
    on_all remote state "$mount"
    if [[ -z $dry && -z $force ]] && process=$(not_reached); then
      fail "whether a job runs on $(label "$process") is not known, it cannot be reached: again" \
        "later, or --force"
    fi
    if [[ -n $dry ]]; then
      [[ -z $force ]] || on_all remote stop 60
    elif process=$(any_running); then
      [[ -n $force ]] || fail "a job runs on $(label "$process"): wait for it (launch/tpu_status.sh" \
        "$name), or give --force, which stops it"
      touch "$pod/deleted" # a tpu_run.sh that still follows must not start it again
      say "stopping the job"
      on_all remote stop 60
    fi
  fi
  [[ -n $dry ]] || touch "$pod/deleted" # tpu_run.sh must not request it again; first the mark
  [[ $why != "there is none" ]] || look # it may have been requested before that
  if [[ $why == "there is none" ]]; then
    say "$name is gone already"
    return
  fi
  delete_request
  [[ -n $dry ]] || say "$name is deleted"
}

main "$@"
