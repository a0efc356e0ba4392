# shellcheck shell=bash
# What the tpu_*.sh scripts stand on beside lib.sh: a pod's saved options, gcloud and what its errors
# mean, the state of a pod.
# shellcheck disable=SC2034 # used by those that source it

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

name='' home=${MEMPHIS_TPU_HOME:-$HOME/.memphis/tpu} pod='' # $pod: what is kept here of the pod
poll=${MEMPHIS_TPU_POLL:-15}                                # seconds between looks at its state
project='' zone='' type='' runtime='' slices=1 spot='' internal='' bucket='' mount=/mnt/memphis
account='' create_flags=() give_up_after=''
node=() worker=() address=() # of each process, in the order of process ids
state=''                     # of the pod: ready, waiting, gone, unknown (gcloud cannot tell)
why=''                       # it is so, in gcloud's words

# ------------------------------------------------------------------ options

# The options that describe a pod; tpu_create.sh saves them, the other scripts read them.
pod_option() {
  case $1 in
    --project) project=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --runtime-version) runtime=$2 ;;
    --service-account) account=$2 ;;
    --create-flag) create_flags+=("$2") ;;
    --give-up-after) give_up_after=$2 ;;
    --slices)
      [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--slices $2 is not a number of 1 or more"
      slices=$2
      ;;
    --bucket)
      [[ $2 =~ ^gs://[^/]+/?$ ]] || fail "--bucket $2: expected gs://BUCKET"
      bucket=${2%/}
      ;;
    --mount)
      [[ $2 == /?* ]] || fail "--mount $2 is not an absolute path"
      mount=${2%/}
      ;;
    *) return 1 ;;
  esac
}

set_name() {
  [[ $1 != -* ]] || fail "unknown option $1 (see --help)"
  [[ -z $name ]] || fail "two names, $name and $1: give one (see --help)"
  [[ $1 =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
    fail "$1 is no name for a TPU: lower-case letters, digits and -, a letter first"
  name=$1 pod=$home/$1
}

save_pod() {
  mkdir -p "$pod"
  {
    printf '%s\n' --project "$project" --zone "$zone" --type "$type" --runtime-version "$runtime"
    printf '%s\n' --slices "$slices" --bucket "$bucket" --mount "$mount"
    [[ -z $spot ]] || echo --spot
    [[ -z $internal ]] || echo --internal-ips
    [[ -z $account ]] || printf '%s\n' --service-account "$account"
    [[ -z $give_up_after ]] || printf '%s\n' --give-up-after "$give_up_after"
    ((${#create_flags[@]} == 0)) || printf -- '--create-flag\n%s\n' "${create_flags[@]}"
  } >"$pod/options.tmp"
  mv -f "$pod/options.tmp" "$pod/options"
}

load_pod() {
  local words at
  [[ -n $name ]] || fail "no name: launch/$program NAME (see --help)"
  [[ -s $pod/options ]] || fail "nothing is known here of a TPU called $name: run" \
    "launch/tpu_create.sh $name with its --type, --zone and --bucket (one that exists stays as it is)"
  mapfile -t words <"$pod/options"
  spot='' internal='' account='' create_flags=() give_up_after='' # of another pod, or of the command
  for ((at = 0; at < ${#words[@]}; at++)); do
    case ${words[at]} in
      --spot) spot=yes ;;
      --internal-ips) internal=yes ;;
      *) pod_option "${words[at]}" "${words[++at]}" || fail "$pod/options: ${words[at - 1]}?" ;;
    esac
  done
  place=(--zone="$zone" --project="$project")
}

# One script at a time changes a pod, or runs on it; those that it calls itself may.
lock_pod() {
  [[ -z $dry && ${MEMPHIS_TPU_LOCKED-} != "$name" ]] || return 0
  exec {pod_lock}>>"$pod/lock"
  flock -n "$pod_lock" || flock -w 60 "$pod_lock" ||
    fail "another script of launch/ is at work on $name: wait for it ('fuser $pod/lock' names it)"
  export MEMPHIS_TPU_LOCKED=$name
}

# hosts_of TYPE, chips_of TYPE: per slice. v5e and v6e count chips, four on each host of several;
# the others count TensorCores, two to a chip, eight to a host.
# https://cloud.google.com/tpu/docs/supported-tpu-configurations
hosts_of() {
  local count=${1##*-}
  case $1 in
    v5litepod-* | v6e-*) echo $((count <= 8 ? 1 : count / 4)) ;;
    *) echo $((count <= 8 ? 1 : count / 8)) ;;
  esac
}

devices_of() {
  local count=${1##*-}
  case $1 in
    v2-* | v3-* | v5litepod-* | v6e-*) echo "$count" ;; # a core of v2 and v3 is a device to JAX
    *) echo $((count / 2)) ;;
  esac
}

# ------------------------------------------------------------------ gcloud

# gc WORD...: its output is in $tmp/out and $tmp/err.
gc() {
  if [[ -n $dry ]]; then
    shown gcloud "$@"
    : >"$tmp/out"
    return
  fi
  child "$tmp/none" gcloud "$@" >"$tmp/out" 2>"$tmp/err"
}

# The first line of gcloud's error, without the name of the command.
gc_error() {
  local line
  line=$(grep -m 1 '^ERROR:' "$tmp/err" || last_error)
  [[ $line =~ ^ERROR:\ \([a-z.-]+\)\ (.*)$ ]] && line=${BASH_REMATCH[1]}
  printf '%s' "${line%.}"
}

# explain WHAT: ends the script with what the error in $tmp/err means to the user.
explain() {
  local error
  error=$(gc_error)
  case $(<"$tmp/err") in
    *"refreshing your current auth tokens"*"ConnectionPool"* | *"ConnectionPool"*"timed out"*)
      fail "cannot $1: no connection to Google ($error). Give the same command again"
      ;;
    *"active account"* | *"gcloud auth login"*) fail "gcloud has no account: run 'gcloud auth login'" ;;
    *SERVICE_DISABLED* | *"has not been used in project"* | *"it is disabled"*)
      fail "the Cloud TPU API is off in $project: gcloud services enable tpu.googleapis.com" \
        "--project=$project"
      ;;
    *"Permission denied on 'locations/"* | *"Location"*"is not found"*)
      fail "zone $zone has no TPUs, or $project may not use it: see 'gcloud compute tpus locations" \
        "list --project=$project', and give another --zone"
      ;;
    *PERMISSION_DENIED* | *403*)
      fail "no permission to $1 in project $project ($error): ask for the role roles/tpu.admin"
      ;;
    *RESOURCE_EXHAUSTED* | *[Qq]uota*)
      fail "no quota to $1 in $zone ($error): ask for it on the page" \
        "https://console.cloud.google.com/iam-admin/quotas?project=$project"
      ;;
    *) fail "cannot $1: $error" ;;
  esac
}

# ------------------------------------------------------------------ the pod

node_names() {
  local number
  if ((slices == 1)); then
    echo "$name"
  else
    for ((number = 0; number < slices; number++)); do
      echo "$name-$number"
    done
  fi
}

# look: sets state and why, and where it is ready node, worker and address.
look() {
  local found message
  if [[ -n $dry ]]; then
    look_dry
    return
  fi
  if ! gc compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state,state.failedData.error.message)'; then
    unseen "$name"
    [[ $state == unknown ]] || why="there is none"
    return
  fi
  IFS=$'\t' read -r found message <"$tmp/out" || true
  case $found in
    ACTIVE) look_at_nodes ;;
    SUSPENDING | SUSPENDED | FAILED | DELETING) state=gone why=$found${message:+: $message} ;;
    *) state=waiting why=${found:-unknown} ;;
  esac
}

# unseen WHAT: gone, where gcloud says so; unknown, where it does not get through.
unseen() {
  case $(<"$tmp/err") in
    *NOT_FOUND*) state=gone why="node $1 is gone" ;;
    *"refreshing your current auth tokens"* | *ConnectionPool* | *"timed out"* | *"HTTP 5"* | *HttpError\ 5*)
      state=unknown why=$(gc_error) # it speaks of accounts, but the network is gone
      ;;
    *account* | *PERMISSION_DENIED* | *"HttpError 403"* | *disabled* | *"Permission denied"*)
      explain "look at $1"
      ;;
    *) state=unknown why=$(gc_error) ;;
  esac
}

look_at_nodes() {
  local one found health ips ip number nodes=() workers=() addresses=()
  state=ready why=ACTIVE
  for one in $(node_names); do
    if ! gc compute tpus tpu-vm describe "$one" "${place[@]}" \
      --format='value(state,networkEndpoints[].ipAddress,health)'; then
      unseen "$one"
      return
    fi
    IFS=$'\t' read -r found ips health <"$tmp/out" || true # the last may be empty
    case $found in
      READY) ;;
      PREEMPTED | TERMINATED | STOPPED | STOPPING | DELETING)
        state=gone why="node $one is $found"
        return
        ;;
      *) state=waiting why="node $one is $found" ;;
    esac
    [[ $health != UNHEALTHY_MAINTENANCE ]] || { state=waiting why="node $one is in maintenance"; }
    number=0
    for ip in ${ips//;/ }; do
      nodes+=("$one") workers+=($((number++))) addresses+=("$ip")
    done
  done
  # Of a pod that is not ready, what is known from before stays.
  if [[ $state == ready ]]; then
    node=("${nodes[@]}") worker=("${workers[@]}") address=("${addresses[@]}")
  fi
}

# What a dry run assumes: the hosts that the type has.
look_dry() {
  local one number
  node=() worker=() address=() state=ready why=ACTIVE
  gc compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state,state.failedData.error.message)'
  for one in $(node_names); do
    gc compute tpus tpu-vm describe "$one" "${place[@]}" \
      --format='value(state,networkEndpoints[].ipAddress,health)'
    for ((number = 0; number < $(hosts_of "$type"); number++)); do
      node+=("$one") worker+=("$number") address+=("ADDRESS-OF-$one-WORKER-$number")
    done
  done
}

check_not_deleted() {
  [[ -n $dry || ! -e $pod/deleted ]] || fail "$name was deleted with launch/tpu_delete.sh: the same" \
    "command requests it again"
}

# One that has just gone is as good as deleted.
delete_request() {
  gc compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet ||
    grep -q NOT_FOUND "$tmp/err" || explain "delete $name"
}

# wait_for_pod: until it is ready or gone, with a line about it whenever its state changes.
wait_for_pod() {
  local last='' since=$SECONDS unknown=0
  while true; do
    look
    [[ $state == waiting || $state == unknown ]] || break
    unknown=$([[ $state == unknown ]] && echo $((unknown + 1)) || echo 0)
    ((unknown < 20)) || explain "look at $name"
    if [[ $why != "$last" ]]; then
      [[ ! -t $terminal ]] || printf '\n' >&"$terminal"
      say "$name: $why; waiting"
      last=$why
    elif [[ -t $terminal ]]; then
      printf '\r%s: %s, %d min' "$name" "$why" $(((SECONDS - since) / 60)) >&"$terminal"
    fi
    child "$tmp/none" sleep "$poll"
  done
}
