# shellcheck shell=bash
# The workers of a pod: ssh to them, to all at once, and what of this checkout they have.

# shellcheck source-path=SCRIPTDIR source=tpu_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

label() { printf '%s worker %s' "${node[$1]}" "${worker[$1]}"; }

# ssh_words PROCESS COMMAND: gcloud's words. Without these flags a dead worker is found out late:
# gcloud tries ten times, each as long as TCP does. --quiet: it may make a key, and ask nothing.
ssh_words() {
  words=(compute tpus tpu-vm ssh "${node[$1]}" "${place[@]}" --worker="${worker[$1]}" --quiet
    --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=15
    --ssh-flag=-oServerAliveCountMax=4)
  [[ -z $internal ]] || words+=(--internal-ip)
  words+=(--command="$2")
}

# quoted WORD...: one line that a shell reads as these words.
quoted() {
  local line
  printf -v line ' %q' "$@"
  printf '%s' "${line:1}"
}

# remote PROCESS OPERATION WORD...: one operation of tpu_remote.sh on one worker; its output is in
# $tmp/worker/PROCESS.out and .err. Returns its exit code; 255: no connection.
remote() {
  local words path=$tmp/worker/$1
  ssh_words "$1" "$(quoted bash memphis/tpu_remote.sh "${@:2}")"
  if [[ -n $dry ]]; then
    shown gcloud "${words[@]}"
    return
  fi
  child "$tmp/none" gcloud "${words[@]}" >"$path.out" 2>"$path.err"
}

# on_all FUNCTION WORD...: FUNCTION PROCESS WORD... for every process, 32 at once; exit codes in
# $tmp/worker/PROCESS.code. Not `gcloud ... --worker=all`: it needs an ssh-agent that has the key,
# and tells one exit code.
on_all() {
  local process pids=()
  mkdir -p "$tmp/worker"
  for process in "${!node[@]}"; do
    if [[ -n $dry ]]; then
      "$1" "$process" "${@:2}"
      echo 0 >"$tmp/worker/$process.code"
      continue
    fi
    (
      exec {alive}>&- # it must not outlive this script
      code=0
      "$1" "$process" "${@:2}" || code=$?
      echo "$code" >"$tmp/worker/$process.code"
    ) &
    pids+=($!)
    if ((${#pids[@]} == 32)); then
      wait "${pids[@]}"
      pids=()
    fi
  done
  ((${#pids[@]} == 0)) || wait "${pids[@]}"
}

# must_all WHAT: ends the script where a worker of the last on_all failed.
must_all() {
  local process
  for process in "${!node[@]}"; do
    [[ $(<"$tmp/worker/$process.code") != 0 ]] || continue
    cp "$tmp/worker/$process.err" "$tmp/err"
    if grep -q '^memphis: ' "$tmp/worker/$process.out"; then
      fail "$(label "$process"): $(sed -n 's/^memphis: //p' "$tmp/worker/$process.out" | tail -n 1)"
    fi
    tail -n 10 "$tmp/worker/$process.out" >&"$terminal"
    fail "$(label "$process") could not $1: $(gc_error)"
  done
}

# ------------------------------------------------------------------ what they have and do

# connection_lost, any_running, after `on_all remote state`: the first such process.
connection_lost() {
  local process
  for process in "${!node[@]}"; do
    [[ $(<"$tmp/worker/$process.code") != 255 ]] || { echo "$process" && return 0; }
  done
  return 1
}

# Unlike 127, of a worker that was never set up: the first that did not answer at all.
not_reached() {
  local process
  for process in "${!node[@]}"; do
    case $(<"$tmp/worker/$process.code") in
      0 | 127) ;;
      *) echo "$process" && return 0 ;;
    esac
  done
  return 1
}

any_running() {
  local process
  for process in "${!node[@]}"; do
    [[ $(<"$tmp/worker/$process.out") != *" running "* ]] || { echo "$process" && return 0; }
  done
  return 1
}

# all_have STAMP: after `on_all remote state`: is it on every worker, whole?
all_have() {
  local process
  for process in "${!node[@]}"; do
    [[ $(<"$tmp/worker/$process.code") == 0 ]] || return 1
    [[ $(<"$tmp/worker/$process.out") == "$1 "* ]] || return 1
  done
}

checkout=$(cd "$here/.." && pwd -P)

own_python() {
  if [[ -n ${MEMPHIS_PYTHON-} ]]; then
    echo "$MEMPHIS_PYTHON"
  elif [[ -x $checkout/.venv/bin/python ]]; then
    echo "$checkout/.venv/bin/python"
  else
    echo python3
  fi
}

stamp_of_checkout() {
  (cd "$checkout" && find memphis_jax convert -type f ! -name '*.pyc' -print0 | sort -z |
    xargs -0 sha256sum pyproject.toml requirements/py312.txt launch/tpu_{remote.sh,devices.py} &&
    echo "${MEMPHIS_TPU_PYTHON-}") | digest
}
