#!/usr/bin/env bash
# What a pod is doing: see --help.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/tpu_status.sh NAME [--dry-run]

Shows the pod NAME: the state of its request and, for every worker, what it was set up with, whether a
job runs, which one, and the last line of its log.
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_workers.sh"

show_worker() {
  local have doing id command last
  if [[ $(<"$tmp/worker/$1.code") != 0 ]]; then
    printf '%s: %s\n' "$(label "$1")" "$(tail -n 1 "$tmp/worker/$1.err")"
    return
  fi
  { read -r have doing id _ && read -r command && read -r last; } <"$tmp/worker/$1.out" || true
  case $have in
    "$stamp") have="has this checkout" ;;
    none) have="not set up" ;;
    unmounted) have="the bucket is not mounted" ;;
    *) have="has another checkout" ;;
  esac
  case $doing in
    running) doing="runs job $id: ${command-}" ;;
    *) doing="idle${command:+, after: $command}" ;;
  esac
  printf '%s: %s; %s\n' "$(label "$1")" "$have" "$doing"
  [[ -z ${last-} ]] || printf '    %s\n' "$last"
}

main() {
  local process stamp
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      *) set_name "$1" && shift ;;
    esac
  done
  load_pod
  open true
  look
  [[ -n $dry ]] || printf '%s: %s, %s (%s x%s%s in %s of %s)\n' "$name" "$state" "$why" "$type" \
    "$slices" "${spot:+, spot}" "$zone" "$project"
  [[ $state == ready ]] || return 0
  on_all remote status "$mount"
  [[ -z $dry ]] || return 0
  stamp=$(stamp_of_checkout)
  for process in "${!node[@]}"; do
    show_worker "$process"
  done
}

main "$@"
