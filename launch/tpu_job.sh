# shellcheck shell=bash
# One job on all workers at once: what tpu_run.sh stands on beside tpu_workers.sh.
# shellcheck disable=SC2154

port=${MEMPHIS_COORDINATOR_PORT:-8476} # of JAX's coordinator, on worker 0
slice_port=8081                        # of MEGASCALE's
heartbeat=${MEMPHIS_HEARTBEAT_SECONDS:-60}
command=() environment=() # what runs; NAME=VALUE
id=''                     # of the job
followers=()              # this side's processes
codes=() order=()         # exit codes, "lost" or "gone", by process; processes in the order of their ends
started='' offset=0       # is there something to stop; how much of worker 0's log has been shown

digest_of_command() { printf '%s\0' "${command[@]:1}" "${environment[@]}" | digest; }

log_of() { printf '%s/%s/%s-worker%s.log' "$logs" "$id" "${node[$1]}" "${worker[$1]}"; }

# After `on_all remote state`: takes up the job of this command if it runs everywhere, stops its
# remains and returns 1; ends the script where another job runs. Sets id. A job whose connection was
# lost is taken up where it has ended too: its exit code was not heard yet.
find_job() {
  local process doing one digest mine='' count=0 runs='' others='' wanted unheard=''
  [[ " ${codes[*]} " != *" lost "* ]] || unheard=$id
  id=$(date -u +%Y%m%d-%H%M%S)-$$
  [[ -z $dry ]] || id=ID
  [[ -z $dry && -z $as_is ]] || return 0
  wanted=$(digest_of_command)
  for process in "${!node[@]}"; do
    read -r _ doing one digest <"$tmp/worker/$process.out" || true
    [[ $doing == running || (-n $unheard && $one == "$unheard") ]] || continue
    [[ $doing == idle ]] || runs=yes
    if [[ $digest != "$wanted" ]]; then
      others+=" $(label "$process")"
    elif [[ -z $mine || $mine == "$one" ]]; then
      mine=$one count=$((count + 1))
    fi
  done
  [[ -z $others ]] || fail "another command runs on$others: wait for it (launch/tpu_status.sh $name)," \
    "or stop it with 'launch/tpu_run.sh $name --stop'"
  if [[ -n $mine ]] && ((count == ${#node[@]})); then
    if [[ -n $runs ]]; then
      say "it runs already: following it"
    else
      say "it has ended meanwhile"
    fi
    id=$mine
    return
  fi
  if [[ -n $runs ]]; then
    say "it runs on $count of ${#node[@]} workers only: stopping it there"
    on_all remote stop 60
    return 1
  fi
}

# run_on PROCESS: the job on one worker, until it ends.
run_on() {
  local process=$1 words line slice=0 variables
  ((slices == 1)) || slice=${node[process]##*-}
  variables=(JAX_COORDINATOR_ADDRESS="${address[0]}:$port" JAX_NUM_PROCESSES="${#node[@]}"
    JAX_PROCESS_ID="$process")
  if ((slices > 1)); then
    variables+=(MEGASCALE_COORDINATOR_ADDRESS="${address[0]}:$slice_port"
      MEGASCALE_PORT="$slice_port" MEGASCALE_NUM_SLICES="$slices" MEGASCALE_SLICE_ID="$slice")
  fi
  line=$(quoted bash memphis/tpu_remote.sh run "$id" "$(digest_of_command)" "${variables[@]}" \
    "${environment[@]}" -- "${command[@]}")
  ssh_words "$process" "$line"
  if [[ -n $dry ]]; then
    shown gcloud "${words[@]}"
    return
  fi
  child "$tmp/none" gcloud "${words[@]}" 2>>"$logs/$id/ssh.log" |
    keep_log "$(log_of "$process")" >/dev/null 2>&1 {terminal}>&-
}

# keep_log FILE: each line once. A connection that breaks takes what was under way with it, and gcloud
# makes another: each begins with "[log of ID]", maybe after half a line of the one before, and the log
# from its first line on.
keep_log() {
  local line begun='' count=0 again=0 # lines kept; how many of them are still to come again
  while IFS= read -r line; do
    if [[ $line == *"[log of $id]" ]]; then
      if [[ -z $begun ]]; then
        : >"$1" # of an earlier call of this script
        count=0
      fi
      begun=yes again=$count
    elif ((again > 0)); then
      again=$((again - 1))
    else
      printf '%s\n' "$line" >>"$1"
      count=$((count + 1))
    fi
  done
}

# code_of PROCESS: gcloud's own errors end with 1 too, so the last line counts; a guard says
# "memphis: ..." too (hosts.py), so that line counts with tpu_remote.sh's own code only.
code_of() {
  local last ended
  last=$(tail -c 200 "$(log_of "$1")" | tail -n 1)
  ended=$(cat "$tmp/worker/$1.code" 2>/dev/null || true)
  if [[ $last =~ ^\[exit\ code\ ([0-9]+)\]$ ]]; then
    echo "${BASH_REMATCH[1]}"
  elif [[ $last != "memphis: "* || $ended != 9 ]]; then
    echo lost
  elif [[ $last == "memphis: the job is gone"* ]]; then
    echo gone
  else
    echo 9
  fi
}

# Starts or follows the job everywhere, until it has ended everywhere. Sets codes and order.
run_job() {
  local process
  codes=() order=() followers=() offset=0
  if [[ -n $dry ]]; then
    on_all run_on
    return
  fi
  mkdir -p "$logs/$id"
  [[ -n $as_is ]] || say "running on ${#node[@]} workers; logs: $logs/$id"
  [[ ! -e $(log_of 0) ]] || offset=$(wc -c <"$(log_of 0)")
  rm -f "$tmp/worker"/*.code
  mkdir -p "$tmp/worker"
  started=yes
  for process in "${!node[@]}"; do
    : >>"$(log_of "$process")"
    (
      exec {alive}>&-
      code=0
      run_on "$process" || code=$?
      # Not where this script was killed: then the folder is gone.
      { echo "$code" >"$tmp/worker/$process.ended" && mv "$tmp/worker/$process".{ended,code}; } \
        2>/dev/null || true
    ) &
    followers+=($!)
  done
  watch_job
  started=''
}

watch_job() {
  local next=$((SECONDS + poll)) deadline=0
  while ((${#order[@]} < ${#node[@]})); do
    child "$tmp/none" sleep 0.2
    show_log
    collect_codes
    if ((deadline == 0)) && some_failed; then
      deadline=$((SECONDS + heartbeat + 60)) # the others notice by themselves within the heartbeat
    fi
    if ((SECONDS >= next)); then
      look
      if [[ $state == gone ]]; then
        say "$name: $why"
        end_followers
        break
      fi
      next=$((SECONDS + poll))
    fi
    if ((deadline && SECONDS >= deadline)); then
      say "some workers go on although another has failed: stopping them"
      stop_everywhere
      deadline=$((SECONDS + 120))
    fi
  done
  show_log
}

show_log() {
  local size
  size=$(wc -c <"$(log_of 0)")
  if ((size > offset)); then
    tail -c "+$((offset + 1))" "$(log_of 0)" | head -c $((size - offset)) | sed '/^\[exit code [0-9]*\]$/d'
    offset=$size
  fi
}

collect_codes() {
  local process
  for process in "${!node[@]}"; do
    [[ -z ${codes[process]-} && -e $tmp/worker/$process.code ]] || continue
    codes[process]=$(code_of "$process")
    order+=("$process")
  done
}

some_failed() {
  local process
  for process in "${order[@]}"; do
    [[ ${codes[process]} == 0 ]] || return 0
  done
  return 1
}

# The pod is gone: no connection to it will say so soon.
end_followers() {
  local process
  kill_children
  wait "${followers[@]}" || true
  for process in "${!node[@]}"; do
    [[ -z ${codes[process]-} ]] || continue
    codes[process]=$(code_of "$process")
    order+=("$process")
  done
}

stop_everywhere() { on_all remote_stop; }
remote_stop() { # beside the follower, whose files these must not be
  local words
  ssh_words "$1" "bash memphis/tpu_remote.sh stop 60"
  child "$tmp/none" gcloud "${words[@]}" >/dev/null 2>&1
}

interrupted() {
  trap '' INT TERM
  if [[ -n $started ]]; then
    say "interrupted: stopping the job on $name; a checkpoint is saved"
    # Its own process: a recipe that is interrupted too kills this one as it ends.
    (
      trap '' PIPE HUP
      stop_job
    ) &
    wait $! || true
  fi
  kill_children
  exit "$1"
}

stop_job() {
  local process
  tmp=$(mktemp -d "/tmp/${program%.sh}.XXXXXX")
  mkdir -p "$tmp/children" "$tmp/worker"
  touch "$tmp/none"
  on_all remote_stop
  if process=$(not_reached); then
    say "$(label "$process") could not be reached, the job may go on: launch/tpu_run.sh $name --stop"
  else
    say "stopped; the same command goes on from the last checkpoint"
  fi
  rm -rf "$tmp"
}
