#!/usr/bin/env bash
# Runs the vLLM worker on a GPU host over ssh: see --help and docs/gpu.md. gpu_remote.sh is the
# other half. Nothing here outlives the script but the job on the host, which does not need it.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/gpu_generate.sh [USER@]HOST[:REMOTE_DIR] [options] -- COMMAND

Runs COMMAND, a call of the vLLM worker, on a GPU host: sends the model, the questions and this
checkout's code, starts the worker there, shows its log, and brings the completions back to --out.

  launch/gpu_generate.sh me@gpu1 -- .venv-vllm/bin/python -m memphis_jax.rounds.generate \
      --model runs/cot/sft/hf --questions runs/cot/data/train.jsonl --out runs/cot/round1/generate

As a stage of `memphis rounds`:  --config.executor.generate="launch/gpu_generate.sh me@gpu1 --"

REMOTE_DIR (default ~/memphis-gpu) keeps models and jobs. The interpreter in COMMAND is replaced by
the host's; local paths after --model, --questions and --out become paths there.

  --port N              ssh port
  --identity FILE       ssh private key
  --ssh-option K=V      any option of ssh_config, as often as needed
  --python PATH         interpreter on the host (default: REMOTE_DIR/.venv-vllm/bin/python)
  --bucket gs://B/DIR   copy through this bucket with gcloud instead of rsync
  --retries N           tries to connect again, and to start again, in a row (default 10)
  --fetch-every S       seconds between fetches of finished blocks (default 30)
  --dry-run             print the commands, contact nobody
  -h, --help            this text

A lost connection, a closed terminal or kill -9 here leave the job running; the same command picks
it up. Ctrl-C and SIGTERM stop it. In every case the same command goes on after the last block.
Exit code: the worker's own; 255 when the connection is lost for good; 1 for other errors.
Set up the host once: docs/gpu.md.
HELP
}

# shellcheck source-path=SCRIPTDIR source=gpu_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/gpu_lib.sh"

remote_dir=memphis-gpu python='' fetch_every=30 # beside the options that gpu_lib.sh names
words=() kinds=() model='' out='' questions=()  # of the worker's command
run='' names=() folders=() job=''               # where it all goes on the host
state='' offset=0 code=0 started=''             # of the job

parse_options() {
  local target=''
  while (($#)) && [[ $1 != -- ]]; do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --port | --identity | --ssh-option | --python | --bucket | --retries | --fetch-every)
        [[ $# -gt 1 && $2 != -- ]] || fail "$1 needs a value (see --help)"
        set_option "$1" "$2"
        shift 2
        ;;
      -*) fail "unknown option $1 (see --help)" ;;
      *)
        [[ -z $target ]] || fail "two hosts, $target and $1: give one, and the command after --"
        target=$1 && shift
        ;;
    esac
  done
  [[ -n $target ]] || fail "no host: launch/gpu_generate.sh user@host -- COMMAND (see --help)"
  (($# > 1)) || fail "no command: launch/gpu_generate.sh $target -- COMMAND (see --help)"
  host=${target%%:*}
  if [[ $target == *:?* ]]; then
    remote_dir=${target#*:}
  fi
  [[ -n $host && $remote_dir != *:* ]] || fail "$target is not of the form user@host:folder"
  parse_command "${@:3}"
}

set_option() {
  case $1 in
    --port) ssh_options+=(-p "$2") ;;
    --identity) ssh_options+=(-i "$2") ;;
    --ssh-option) ssh_options+=(-o "$2") ;;
    --python) python=$2 ;;
    --bucket)
      [[ $2 == gs://?* ]] || fail "--bucket $2: expected gs://BUCKET or gs://BUCKET/FOLDER"
      bucket=${2%/}
      ;;
    --retries | --fetch-every)
      [[ $2 =~ ^[0-9]+$ ]] || fail "$1 $2 is not a whole number"
      if [[ $1 == --retries ]]; then retries=$2; else fetch_every=$2; fi
      ;;
  esac
}

# The worker's words without the interpreter; `kinds` says which of them are paths.
parse_command() {
  local kind=word
  [[ "$1 ${2-}" == "-m memphis_jax.rounds.generate" ]] ||
    fail "the command after -- must be PYTHON -m memphis_jax.rounds.generate ... (in a config:" \
      "generate.engine=vllm)"
  for word in "$@"; do
    case $word in
      --model=* | --questions=* | --out=*)
        words+=("${word%%=*}") kinds+=(word)
        word=${word#*=} kind=${words[-1]#--}
        ;;
      --model | --questions | --out)
        words+=("$word") kinds+=(word) kind=${word#--}
        continue
        ;;
      --*) kind=word ;;
    esac
    words+=("$word") kinds+=("$kind")
    case $kind in
      model) model=$word kind=word ;;
      out) out=$word kind=word ;;
      questions) questions+=("$word") ;;
    esac
  done
  [[ -n $model && -n $out && ${#questions[@]} -gt 0 ]] ||
    fail "the command after -- lacks --model, --questions or --out"
  [[ -d $model ]] || fail "--model $model: no such folder"
  for word in "${questions[@]}"; do
    [[ -f $word ]] || fail "--questions $word: no such file"
  done
}

# ------------------------------------------------------------------ the job

# Names every input by its content, and the job by its inputs, its command and --out.
name_inputs() {
  local number=0 file
  mkdir -p "$tmp/questions" "$tmp/code"
  for file in "${questions[@]}"; do
    cp "$file" "$tmp/questions/$((number++))-${file##*/}"
  done
  (cd "$here/.." && find memphis_jax -name '*.py' -print0 | tar --null -T - -cf -) |
    tar -xf - -C "$tmp/code"
  cp "$here/gpu_remote.sh" "$tmp/code"
  # Without its certificate only the files say what a model is.
  if [[ -f $model/conversion.json && " ${words[*]} " != *" --uncertified "* ]]; then
    names=("models/$(digest 64 <"$model/conversion.json")")
  else
    names=("models/$(digest_folder "$model" 64)")
  fi
  names+=("questions/$(digest_folder "$tmp/questions")" "code/$(digest_folder "$tmp/code")")
  folders=("$model" "$tmp/questions" "$tmp/code")
  job=$(printf '%s\0' "$out" "${names[@]:0:2}" "${words[@]}" | digest)
}

connect() {
  local tool=rsync
  if [[ -n $bucket ]]; then
    tool=gcloud
  fi
  if [[ -n $dry ]]; then
    first_contact "$remote_dir" "$python" "$tool" "$job"
    root=$remote_dir python=${python:-$root/.venv-vllm/bin/python}
  else
    command -v "$tool" >/dev/null || fail "this machine has no $tool: install it"
    first_contact "$remote_dir" "$python" "$tool" "$job"
    { read -r root && read -r python && read -r state code && read -r offset; } <"$tmp/out" || true
    [[ $root == /* && -n $offset ]] || fail "the login on $host prints text of its own ($root):" \
      "its ~/.bashrc must be silent for commands; rsync needs that too"
  fi
  run=$root/runs/$job
}

# Inputs in place, local blocks back on the host, job started.
prepare() {
  local number sizes=() sent=()
  for number in "${!names[@]}"; do
    sizes+=("${names[number]}" "$(du -skL --apparent-size "${folders[number]}" | cut -f1)")
  done
  persist remote missing "$root" "${sizes[@]}"
  [[ -n $dry ]] || cp "$tmp/out" "$tmp/missing"
  for number in "${!names[@]}"; do
    if [[ -n $dry ]] || grep -qxF "${names[number]}" "$tmp/missing"; then
      send "${folders[number]}" "${names[number]}"
      sent+=("${names[number]}")
    fi
  done
  ((${#sent[@]} == 0)) || persist remote publish "$root" "${sent[@]}"
  persist send_back "$out" "$run"
  start
}

start() {
  local command=("$python") at=0 number
  for number in "${!words[@]}"; do
    case ${kinds[number]} in
      model) command+=("$root/${names[0]}") ;;
      questions) command+=("$root/${names[1]}/$((at++))-${words[number]##*/}") ;;
      out) command+=("$run/out") ;;
      word) command+=("${words[number]}") ;;
    esac
  done
  started=yes # from here on there may be something to stop
  persist remote start "$run" "$out" "$root/${names[2]}" "${command[@]}"
}

# Shows the log and fetches blocks until the job has ended.
follow() {
  local restarts=0 next=$((SECONDS + fetch_every))
  while true; do
    persist remote poll "$run" "$offset"
    [[ -z $dry ]] || return 0
    read -r state code <"$tmp/out"
    tail -n +2 "$tmp/out" >"$tmp/log"
    cat "$tmp/log"
    offset=$((offset + $(wc -c <"$tmp/log")))
    case $state in
      finished | exited) return ;;
      idle)
        ((++restarts <= retries)) || fail "the job was killed $restarts times: see $host:$run/log"
        say "the job is gone (killed, or $host was restarted): starting it again"
        prepare
        ;;
    esac
    if ((SECONDS >= next)); then
      persist fetch "$run" "$out"
      next=$((SECONDS + fetch_every))
    fi
  done
}

# completions.jsonl last: whoever sees it sees everything.
finish() {
  persist fetch "$run" "$out"
  if ((code)); then
    persist remote log_end "$run"
    say "the worker on $host failed with exit code $code; the end of its log, $run/log:"
    cat "$tmp/out" >&2
    exit "$code"
  fi
  if [[ $state == finished || -n $dry ]]; then
    persist fetch_completions "$run" "$out"
    [[ -n $dry ]] || mv -f "$out/.fetch/completions.jsonl" "$out/completions.jsonl"
  fi
}

interrupted() {
  trap '' INT TERM
  kill_children
  if [[ -n $started && -z $dry ]]; then
    say "interrupted: stopping the job on $host"
    stop_job & # its own process: a recipe that is interrupted too kills this one as it ends
    wait $! || true
  fi
  exit "$1"
}

stop_job() {
  local connection=$tmp/ssh
  local tmp=$tmp/stop # `kill_children` must not meet this one's
  trap '' PIPE HUP
  mkdir -p "$tmp/children"
  cp "$connection" "$tmp"
  if remote stop "$run"; then
    say "stopped; the same command goes on after the last block"
  else
    say "could not stop it ($(last_error)): it goes on as $host:$run"
  fi
}

main() {
  parse_options "$@"
  out=${out%/} model=${model%/}
  [[ $out == /* ]] || out=$PWD/$out # rsync takes "a:b" for a host
  [[ $model == /* ]] || model=$PWD/$model
  open_connection
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM
  if [[ -z $dry ]]; then
    mkdir -p "$out"
    exec {claim}<"$out"
    flock -w 60 "$claim" || fail "another gpu_generate.sh is using $out: wait for it"
    mkdir -p "$out/.fetch"
  fi
  name_inputs
  connect
  case $state in
    finished) say "finished before: fetching what is not here" ;;
    running)
      say "the job runs already: following it"
      started=yes
      follow
      ;;
    *) # idle, or failed before
      prepare
      follow
      ;;
  esac
  finish
  rm -rf "$out/.fetch"
}

main "$@"
