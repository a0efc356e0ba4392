# shellcheck shell=bash
# What gpu_generate.sh stands on beside lib.sh: an ssh connection that is made anew when it is lost,
# and copying.

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

host='' ssh_options=() # as ssh takes them
root=''                # the folder on the host
bucket=''              # gs://..., or empty: rsync
retries=10             # how often to connect again, in a row

open_connection() {
  local ssh=(ssh "${ssh_options[@]}" -o BatchMode=yes -o ConnectTimeout=15
    -o ServerAliveInterval=15 -o ServerAliveCountMax=3
    -o ControlMaster=auto -o ControlPersist=60)
  open close_connection
  { printf 'exec' && printf ' %q' "${ssh[@]}" -o "ControlPath=$tmp/mux" && printf ' "$@"\n'; } >"$tmp/ssh"
}

close_connection() { bash "$tmp/ssh" -O exit "$host"; } # there may be none

# ------------------------------------------------------------------ the connection

# remote OPERATION WORD...: one operation of gpu_remote.sh; its output is in $tmp/out and $tmp/err.
# The words go in with the script, so that no login shell sees them. 255: no connection.
remote() {
  local rc=0
  if [[ -n $dry ]]; then
    shown ssh "${ssh_options[@]}" "$host" bash -s gpu_remote.sh "$@"
    return
  fi
  { printf 'set --' && printf ' %q' "$@" && echo && cat "$here/gpu_remote.sh"; } >"$tmp/in"
  child "$tmp/in" bash "$tmp/ssh" "$host" bash -s >"$tmp/out" 2>"$tmp/err" || rc=$?
  case $rc in
    0 | 255) return "$rc" ;;
    *) fail "$host: $(last_error)" ;;
  esac
}

# persist FUNCTION WORD...: again, after a pause, while it returns 255 (no connection).
persist() {
  local try rc pause
  for ((try = 1; ; try++)); do
    rc=0
    "$@" || rc=$?
    ((rc == 255)) || return "$rc"
    if ((try > retries)); then
      say "no connection to $host after $retries tries ($(last_error)). What runs there goes on;" \
        "the same command picks it up"
      exit 255
    fi
    pause=$((try < 6 ? 1 << (try - 1) : 30))
    say "lost the connection to $host ($(last_error)); try $try of $retries in $pause s"
    child "$tmp/none" sleep "$pause"
  done
}

# first_contact WORD...: `remote hello`, where no connection is the user's error.
first_contact() {
  local rc=0
  remote hello "$@" || rc=$?
  ((rc)) || return 0
  case $(<"$tmp/err") in
    *"Could not resolve"*) fail "no such host: ${host#*@} ($(last_error))" ;;
    *"Host key verification failed"*)
      fail "the key of $host is unknown or has changed: run 'ssh $host' once by hand and check it"
      ;;
    *"Permission denied"*)
      fail "$host refuses the login ($(last_error)): try 'ssh $host' by hand, or give --identity"
      ;;
    *) fail "cannot reach $host by ssh: $(last_error)" ;;
  esac
}

# ------------------------------------------------------------------ copying

# transfer RSYNC-WORD...: 255 for a lost connection; another error ends the script.
transfer() {
  local rc=0 call=(rsync -rt -s --timeout=60 -e "bash $tmp/ssh" "$@")
  if [[ -n $dry ]]; then
    shown "${call[@]}"
    return
  fi
  child "$tmp/none" "${call[@]}" 2>"$tmp/err" || rc=$?
  case $rc-$(<"$tmp/err") in
    0-* | 24-*) return 0 ;; # 24: a temporary file was renamed meanwhile
    *"No space left"*) fail "disk full: $(grep -m 1 'No space left' "$tmp/err")" ;;
    255-* | 10-* | 12-* | 20-* | 30-* | 35-*) return 255 ;;
    *) fail "rsync failed (exit code $rc): $(grep -m 1 . "$tmp/err")" ;;
  esac
}

# cloud WORD...: gcloud on this side; it tries again by itself.
cloud() {
  if [[ -n $dry ]]; then
    shown gcloud storage "$@"
    return
  fi
  child "$tmp/none" gcloud storage "$@" >"$tmp/err" 2>&1 || fail "gcloud failed: $(last_error)"
}

# send FOLDER NAME: to ROOT/NAME.partial; `remote publish` puts it in place.
send() {
  say "sending ${2%%/*} ($(du -shL "$1" | cut -f1))"
  if [[ -n $bucket ]]; then
    cloud rsync --recursive --no-ignore-symlinks "$1" "$bucket/$2"
    persist remote pull "$bucket/$2" "$root/$2.partial"
  else
    # Unfinished files wait outside the folder: a receiver that lost its sender may still write.
    persist transfer -L --temp-dir="$root/incoming" --partial-dir="$root/incoming/${2##*/}" \
      "$1/" "$host:$root/$2.partial/"
  fi
}

# All that the worker publishes but completions.jsonl: the blocks make it, and it comes last.
not_blocks='(.*/)?([.].*|[^/]*[.]tmp|completions[.]jsonl)$'
exclude=(--exclude='.*' --exclude='*.tmp' --exclude=completions.jsonl)

# fetch RUN OUT: the blocks that are not here yet; each appears whole.
fetch() {
  local run=$1 out=$2 url=$bucket/runs/${1##*/}
  if [[ -n $bucket ]]; then
    remote push "$run/out" "$url" "$not_blocks" || return
    [[ -n $dry || -s $tmp/out ]] || return 0
    cloud rsync --recursive "--exclude=$not_blocks" "$url" "$out"
  else
    transfer -z --temp-dir="$out/.fetch" "${exclude[@]}" "$host:$run/out/" "$out/"
  fi
}

fetch_completions() {
  local run=$1 out=$2
  if [[ -n $bucket ]]; then
    cloud cp "$bucket/runs/${run##*/}/completions.jsonl" "$out/.fetch/completions.jsonl"
  else
    transfer -z --partial "$host:$run/out/completions.jsonl" "$out/.fetch/"
  fi
}

# send_back OUT RUN: the blocks that the host has lost; what it has stays.
send_back() {
  local out=$1 run=$2 url=$bucket/runs/${2##*/}
  [[ -d $out && -n $(find "$out" -name 'block*.jsonl' -print -quit) ]] || return 0
  if [[ -n $bucket ]]; then
    cloud rsync --recursive "--exclude=$not_blocks" "$out" "$url"
    remote pull "$url" "$run/out" --no-clobber
  else
    transfer --ignore-existing --temp-dir="$root/incoming" "${exclude[@]}" \
      "$out/" "$host:$run/out/"
  fi
}
