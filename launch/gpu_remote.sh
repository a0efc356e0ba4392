#!/usr/bin/env bash
# The GPU host's half of gpu_generate.sh: one operation per call, `bash -s` over ssh, its words set
# in front. Not for calling by hand. Also sent with the code, because a job's supervisor runs it.
#
#   ROOT/models|questions|code/HASH   inputs, in place only when whole (HASH.partial until then)
#   ROOT/incoming/                    what rsync has received of a file that is not whole yet
#   ROOT/runs/ID/                     one job: out/ log pid exit lock for (--out of its user)
#
# Exit code 9: an error for the user, one line on stderr. 255 is ssh's own: no connection.
# shellcheck disable=SC2317 # every function is called by its name in "$@"
set -euo pipefail

fail() {
  printf '%s\n' "$*" >&2
  exit 9
}

# hello ROOT PYTHON TOOL ID: checks the host; prints ROOT and PYTHON as absolute paths, the state
# of the job and the size of its log.
hello() {
  local root=$1 python=$2 tool=$3 run need found why
  case $root in
    [~]/*) root=$HOME/${root:2} ;;
    /*) ;;
    *) root=$HOME/$root ;;
  esac
  for need in flock setsid "$tool"; do
    command -v "$need" >/dev/null || fail "it has no $need: $(remedy "$need")"
  done
  why=$(mkdir -p "$root"/{models,questions,code,runs,incoming} 2>&1) ||
    fail "it cannot make the folder $root: ${why##*: }"
  case $python in
    "") python=$root/.venv-vllm/bin/python ;;
    [~]/*) python=$HOME/${python:2} ;;
  esac
  found=$(command -v -- "$python") || fail "it has no $python: build the environment there" \
    "(docs/gpu.md, 'Install'), or name another with --python"
  "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$found does not start, or is older than Python 3.11 (docs/gpu.md, 'Install')"
  find "$root/incoming" -maxdepth 1 -type f -mmin +60 -delete # of receivers that were killed
  run=$root/runs/$4
  mkdir -p "$run/out"
  touch "$run/log"
  printf '%s\n' "$root" "$found" "$(state "$run")" "$(wc -c <"$run/log")"
}

remedy() {
  case $1 in
    gcloud) echo "install the Google Cloud CLI there" ;;
    rsync) echo "apt-get install rsync there, or use --bucket" ;;
    *) echo "apt-get install util-linux there" ;;
  esac
}

# missing ROOT [NAME KILOBYTES]...: prints the names that are not in place; they must find room.
missing() {
  local root=$1 names=() need=0 there free
  shift
  while (($#)); do
    if [[ ! -d $root/$1 ]]; then
      names+=("$1")
      there=0 # what an interrupted transfer left counts as sent
      if [[ -d $root/$1.partial ]]; then
        there=$(du -sk "$root/$1.partial" | cut -f1)
      fi
      need=$((need + $2 - (there < $2 ? there : $2)))
    fi
    shift 2
  done
  free=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
  ((need <= free)) || fail "its disk is too full: $root has $((free / 1024)) MB free," \
    "$((need / 1024)) MB are to come; delete old folders in $root/models, or name another folder"
  printf '%s\n' "${names[@]}"
}

# publish ROOT NAME...: puts each whole NAME.partial in place.
publish() {
  local root=$1 name
  for name in "${@:2}"; do
    if [[ -d $root/$name ]]; then
      rm -rf "$root/$name.partial"
    else
      mv -T "$root/$name.partial" "$root/$name"
    fi
    rm -rf "$root/incoming/${name##*/}"
  done
}

# pull URL FOLDER [FLAG]: copies from the bucket. The lock is for a download that outlived its ssh.
pull() {
  local url=$1 folder=$2
  mkdir -p "$folder"
  exec 8>>"${folder%/}.lock"
  flock 8
  gcloud storage rsync --recursive "${@:3}" "$url" "$folder" >&2 || fail "its gcloud cannot copy $url"
  rm -f "${folder%/}.lock"
}

# push FOLDER URL EXCLUDE: copies to the bucket; prints nothing where there is nothing to copy.
push() {
  [[ -n $(find "$1" -name '*.jsonl' -print -quit) ]] || return 0
  gcloud storage rsync --recursive "--exclude=$3" "$1" "$2" >&2 || fail "its gcloud cannot copy to $2"
  if [[ -e $1/completions.jsonl ]]; then
    gcloud storage cp "$1/completions.jsonl" "$2/completions.jsonl" >&2 ||
      fail "its gcloud cannot copy to $2"
  fi
  echo pushed
}

# A job runs while it holds its lock and has not written its exit code.
running() {
  [[ -e $1/lock && ! -e $1/exit ]] && ! flock -n "$1/lock" true
}

# state RUN: running; finished: with completions; exited: otherwise; idle: never started, or gone.
state() {
  if running "$1"; then
    echo "running 0"
  elif [[ ! -e $1/exit ]]; then
    echo "idle 0"
  elif [[ $(<"$1/exit") == 0 && -e $1/out/completions.jsonl ]]; then
    echo "finished 0"
  else
    echo "exited $(<"$1/exit")"
  fi
}

# start RUN OUT CODE PYTHON WORD...: starts the job unless it runs. OUT: the user's own folder.
start() {
  local run=$1 out=$2 code=$3 other
  printf '%s\n' "$out" >"$run/for"
  for other in "${run%/*}"/*; do
    if [[ $other != "$run" && -e $other/for && $(<"$other/for") == "$out" ]] && running "$other"; then
      fail "another command's job for $out still runs there; wait for it, or stop it there:" \
        "kill -- -$(cat "$other/pid")"
    fi
  done
  exec 9>>"$run/lock"
  if [[ -e $run/exit ]]; then
    flock -w 30 9 || fail "processes of the job before still hold $run/lock: see 'fuser $run/lock'"
  else
    flock -n 9 || return 0 # it runs
  fi
  rm -f "$run/exit" "$run/pid"
  cd "$run"
  PYTHONPATH=$code PYTHONUNBUFFERED=1 setsid bash "$code/gpu_remote.sh" supervise "$run" "${@:4}" \
    </dev/null >>"$run/log" 2>&1 &
}

# supervise RUN COMMAND...: the leader of the job's session. Keeps descriptor 9, the lock.
supervise() {
  local run=$1 code=0
  trap : TERM # `stop` asks the whole group; the exit code is still to be written
  echo $$ >"$run/pid"
  "${@:2}" || code=$?
  echo "$code" >"$run/exit.tmp"
  mv -f "$run/exit.tmp" "$run/exit"
  kill -KILL -- "-$$" # engine processes of a killed worker would keep the GPU's memory
}

# poll RUN OFFSET: waits a little for news; prints the state, then the log from OFFSET.
poll() {
  local run=$1 offset=$2 tick news
  for ((tick = 0; tick < 50; tick++)); do
    running "$run" || break
    ((tick < 5)) || (($(wc -c <"$run/log") <= offset)) || break
    sleep 0.2
  done
  news=$(state "$run")
  if (($(wc -c <"$run/log") > offset + 1000000)); then
    news="running 0" # there is more to fetch
  fi
  echo "$news"
  tail -c "+$((offset + 1))" "$run/log" | head -c 1000000 || true # `tail` minds that
}

log_end() { tr '\r' '\n' <"$1/log" | tail -n 5 | cut -c 1-500; }

# stop RUN: ends the job and everything that it started.
stop() {
  local run=$1 tick
  for ((tick = 0; tick < 100; tick++)); do
    running "$run" || return 0
    if [[ -s $run/pid ]]; then
      if ((tick < 50)); then
        kill -TERM -- "-$(<"$run/pid")" 2>/dev/null || true
      else
        kill -KILL -- "-$(<"$run/pid")" 2>/dev/null || true
      fi
    fi
    sleep 0.2
  done
  fail "the job in $run does not end"
}

"$@"
exit # before anything that the operation left on stdin
