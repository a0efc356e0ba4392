#!/usr/bin/env bash
# A TPU worker's half of the tpu_*.sh scripts: one operation per ssh. Not for calling by hand.
#
#   ~/memphis/stamp               what was set up last, whole
#   ~/memphis/python              the interpreter; venv/ or, with one of the image's own, site/
#   ~/memphis/job/                the last job: id digest command log exit lock pid
#
# A job does not need the ssh session that started it. gcloud runs a command AGAIN when its
# connection breaks (command_lib/compute/tpus/tpu_vm/ssh.py, AttemptRunWithRetries): `run` of a job
# that runs already follows it.
# An error for the user is a line "memphis: ...", exit code 9.
# shellcheck disable=SC2317 # every function is called by its name in "$@"
set -euo pipefail
export LC_ALL=C
cd ~/memphis
job=$PWD/job

fail() {
  printf 'memphis: %s\n' "$*"
  exit 9
}

# ------------------------------------------------------------------ setting up

# install STAMP WHEEL PYTHON: PYTHON empty: an environment of its own, with jax[tpu].
install() {
  local wheel=$PWD/$2 python=$3 uv
  rm -f stamp
  if [[ -n $python ]]; then
    rm -rf site.new
    "$python" -m pip install --quiet --no-deps --no-index --target site.new "$wheel" >&2 ||
      fail "$python cannot install ${wheel##*/}: is pip there?"
    rm -rf site
    mv site.new site
    echo "$python" >python
    return
  fi
  uv=$(command -v uv || echo ~/.local/bin/uv)
  [[ -x $uv ]] || python3 -m pip install --quiet --user uv >&2 ||
    fail "python3 -m pip cannot install uv: has this worker a way to the internet?"
  rm -rf site
  # The images' own Python may be too old: uv brings one.
  [[ -x venv/bin/python ]] || "$uv" venv --quiet --python 3.12 venv >&2 || fail "no Python 3.12"
  "$uv" pip install --quiet --python venv/bin/python --constraint py312.txt \
    --reinstall-package memphis-jax "memphis-jax[tpu] @ file://$wheel" >&2 ||
    fail "uv pip install failed"
  echo "$PWD/venv/bin/python" >python
}

# mount BUCKET FOLDER: with no cache of metadata, since other hosts write there; on a TPU VM gcsfuse
# would keep it for good (cfg/params.yaml of gcsfuse, metadata-cache-ttl-secs, "high-performance").
mount() {
  local bucket=$1 folder=$2 why
  if ! mountpoint -q "$folder"; then
    unmount_dead "$folder"
    command -v gcsfuse >/dev/null || install_gcsfuse
    if ! mkdir -p "$folder" 2>/dev/null || [[ ! -w $folder ]]; then
      sudo mkdir -p "$folder" && sudo chown "$(id -u):$(id -g)" "$folder"
    fi
    why=$(gcsfuse --metadata-cache-ttl-secs=0 "$bucket" "$folder" 2>&1) ||
      fail "gcsfuse cannot mount $bucket: $(tail -n 1 <<<"$why")"
  fi
  local test=$folder/.write-test-$HOSTNAME-$$
  why=$(touch "$test" 2>&1 && rm "$test" 2>&1) ||
    fail "it may not write to gs://$bucket: give the workers' service account the role" \
      "roles/storage.objectUser there"
}

# unmount_dead FOLDER: a gcsfuse that was killed leaves a mount, "Transport endpoint is not connected",
# on which not even mkdir -p works.
unmount_dead() {
  is_dead "$1" || return 0
  {
    fusermount -uz "$1" || fusermount3 -uz "$1" || umount -l "$1" || sudo umount -l "$1"
  } >&2 || ! is_dead "$1" || fail "a gcsfuse that died has left a mount: sudo umount -l $1"
}

is_dead() { [[ $(stat "$1" 2>&1) == *"not connected"* ]]; }

# https://cloud.google.com/storage/docs/cloud-storage-fuse/install
install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt
  {
    curl -fsS "$url/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $url gcsfuse-$(lsb_release -cs) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
  } >&2 || fail "cannot install gcsfuse: install it on the workers by hand"
}

stamp() { echo "$1" >stamp; }

# ------------------------------------------------------------------ the job

running() { [[ -e $job/lock && ! -e $job/exit ]] && ! flock -n "$job/lock" true; }

# state FOLDER: prints the stamp, "running" or "idle", and id and digest of the job that runs or has
# told its exit code.
state() {
  local stamp=none
  [[ ! -s stamp ]] || stamp=$(<stamp)
  mountpoint -q "$1" || stamp=unmounted
  if running; then
    echo "$stamp running $(<"$job/id") $(<"$job/digest")"
  elif [[ -e $job/exit ]]; then
    echo "$stamp idle $(<"$job/id") $(<"$job/digest")"
  else
    echo "$stamp idle none none"
  fi
}

# run ID DIGEST NAME=VALUE... -- WORD...: starts the job ID unless it has been started; prints
# "[log of ID]", its log from the first line on, and its exit code, which is this operation's too.
# The first WORD stands for the interpreter.
run() {
  local id=$1 code
  if [[ ! -e $job/id || $(<"$job/id") != "$id" ]]; then
    start "$@"
  fi
  printf '[log of %s]\n' "$id"
  follow
  [[ -z $(tail -c 1 "$job/log") ]] || echo
  [[ -e $job/exit ]] || fail "the job is gone: this worker was restarted, or its processes killed"
  code=$(<"$job/exit")
  printf '[exit code %s]\n' "$code"
  exit $((code == 255 ? 254 : code)) # gcloud takes 255 for a lost connection
}

start() {
  local id=$1 digest=$2 environment=() python
  shift 2
  while [[ $1 != -- ]]; do
    environment+=("$1") && shift
  done
  shift 2 # -- and the interpreter
  [[ -s python ]] || fail "not set up: launch/tpu_setup.sh"
  python=$(<python)
  running && fail "another job runs here: $(<"$job/command")"
  [[ ! -d site ]] || environment+=("PYTHONPATH=$PWD/site")
  mkdir -p "$job"
  exec 9>>"$job/lock"
  flock -w 30 9 || fail "processes of the job before still hold $job/lock: see 'fuser $job/lock'"
  rm -f "$job"/{exit,pid}
  : >"$job/log"
  printf '%s\n' "$digest" >"$job/digest"
  printf ' %q' "$@" >"$job/command"
  printf '%s\n' "$id" >"$job/id"
  PYTHONUNBUFFERED=1 setsid env "${environment[@]}" bash "$PWD/tpu_remote.sh" supervise \
    "$python" "$@" </dev/null >>"$job/log" 2>&1 &
  disown
  while [[ ! -s $job/pid ]] && kill -0 $! 2>/dev/null; do sleep 0.05; done
  exec 9>&-
}

# supervise COMMAND...: the leader of the job's session. Keeps descriptor 9, the lock.
supervise() {
  local code=0
  trap : TERM # `stop` asks the whole group; the exit code is still to be written
  echo $$ >"$job/pid"
  "$@" || code=$?
  echo "$code" >"$job/exit.tmp"
  mv -f "$job/exit.tmp" "$job/exit"
  kill -KILL -- "-$$" # nothing may keep the chips
}

# Prints the log until the job ends; one follower at a time.
follow() {
  local shown=0 size last=''
  [[ ! -s $job/follower ]] || kill "$(<"$job/follower")" 2>/dev/null || true
  echo $$ >"$job/follower"
  while [[ -z $last ]]; do
    running || last=yes # then once more
    size=$(wc -c <"$job/log")
    if ((size > shown)); then
      tail -c "+$((shown + 1))" "$job/log" | head -c $((size - shown))
      shown=$size
    fi
    [[ -n $last ]] || sleep 0.2
  done
}

# stop SECONDS: SIGTERM, so that a checkpoint is saved; SIGKILL after so many seconds.
stop() {
  local deadline=$((SECONDS + $1)) asked=''
  while running; do
    if [[ ! -s $job/pid ]]; then
      :
    elif ((SECONDS < deadline)); then
      [[ -n $asked ]] || kill -TERM -- "-$(<"$job/pid")" 2>/dev/null || true
      asked=yes
    else
      kill -KILL -- "-$(<"$job/pid")" 2>/dev/null || true
    fi
    sleep 0.2
  done
}

# status FOLDER: for people.
status() {
  state "$1"
  if [[ -s $job/command ]]; then
    cat "$job/command" && echo
    tr '\r' '\n' <"$job/log" | sed '/^[[:space:]]*$/d' | tail -n 1 | cut -c 1-200
  fi
}

"$@"
