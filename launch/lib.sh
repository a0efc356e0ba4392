# shellcheck shell=bash
# What every script here stands on: messages, digests, child processes that never outlive the script.
# shellcheck disable=SC2034 # used by those that source it

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
program=${0##*/}
dry='' # print commands, run none

exec {terminal}>&2 # a trap may run while descriptor 2 is a file
say() { printf '%s: %s\n' "$program" "$*" >&"$terminal"; }
fail() {
  say "$@"
  exit 1
}

digest() { sha256sum | cut -c "1-${1:-16}"; }

# By name and content, links followed: the order of the names is fixed by LC_ALL.
digest_folder() {
  (cd "$1" && find -L . -type f -print0 | sort -z | xargs -0 -r sha256sum) | digest "${2-}"
}

shown() { printf '+' && printf ' %q' "$@" && echo; }

last_error() { tr -d '\r' <"$tmp/err" | sed '/^[[:space:]]*$/d' | tail -n 1; }

# ------------------------------------------------------------------ child processes

# open CLEANUP: makes $tmp. Whatever way this script ends, kill -9 too, the pipe closes then: its
# children end, CLEANUP (a function) runs, $tmp goes.
open() {
  tmp=$(mktemp -d "/tmp/${program%.sh}.XXXXXX") # a short path: a socket's may have 100 letters
  mkdir "$tmp/children"
  touch "$tmp"/{none,err}
  exec {alive}> >(guard "$1" >/dev/null 2>&1)
  guard_pid=$!
  trap 'exec {alive}>&-; wait "$guard_pid" || true' EXIT
}

guard() {
  trap '' INT TERM HUP
  exec {terminal}>&-
  cat
  kill_children
  "$1" || true
  rm -rf "$tmp"
}

# child STDIN COMMAND...: waits in a way that a signal's trap can interrupt. A session of its own,
# so that all of it can be killed: gcloud is a script that starts Python.
child() {
  local rc=0 pid
  setsid "${@:2}" <"$1" {alive}>&- {terminal}>&- &
  pid=$!
  touch "$tmp/children/$pid"
  wait "$pid" || rc=$?
  rm -f "$tmp/children/$pid"
  return "$rc"
}

kill_children() {
  local path
  for path in "$tmp/children"/*; do
    kill -- "-${path##*/}" 2>/dev/null || true
  done
}
