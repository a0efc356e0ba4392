#!/usr/bin/env bash
# Requests a TPU pod and waits for it: see --help and docs/tpu.md.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/tpu_create.sh NAME --type TYPE --bucket gs://BUCKET [options]

Requests a TPU slice as a queued resource and waits until it is ACTIVE, or says why it failed.
Everything that can be known to be wrong is said before anything is created.

  launch/tpu_create.sh pod --type v5litepod-16 --zone us-east5-b --bucket gs://me-memphis --spot

  --type TYPE             accelerator type: v5litepod-16, v6e-16, v5p-16, v4-16, ...
                          ('memphis plan' says what fits on which)
  --bucket gs://B         bucket with hierarchical namespace, for everything that must survive
  --mount DIR             where it is mounted, here and on every worker (default /mnt/memphis)
  --zone Z                default: gcloud's compute/zone
  --project P             default: gcloud's project
  --spot                  a cheaper pod that may be preempted at any time
  --slices N              N slices of that type, joined over the data centre network
  --runtime-version V     default: the one for the type
  --service-account A     that the workers act as; it needs to write the bucket
  --internal-ips          no external addresses; ssh goes to the internal ones
  --give-up-after T       a request that was not met in this time (6h, 2d) fails
  --create-flag=--F=V     another flag of 'gcloud compute tpus queued-resources create'
  --dry-run               print the commands, contact nobody
  -h, --help              this text

The options are kept in ~/.memphis/tpu/NAME: the other scripts need the name alone. A pod that exists
stays as it is; one that was preempted is deleted and requested again. Ctrl-C leaves the request in
the queue; the same command waits on.
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_lib.sh"

unless_deleted=''

parse_options() {
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) dry=yes && shift ;;
      --spot) spot=yes && shift ;;
      --internal-ips) internal=yes && shift ;;
      --again) load_pod && shift ;; # of the other scripts: with the options that were saved
      --unless-deleted) unless_deleted=yes && shift ;; # of tpu_run.sh: by tpu_delete.sh, meanwhile
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --*)
        [[ $# -gt 1 ]] || fail "$1 needs a value (see --help)"
        pod_option "$1" "$2" || fail "unknown option $1 (see --help)"
        shift 2
        ;;
      *) set_name "$1" && shift ;;
    esac
  done
  [[ -n $name ]] || fail "no name: launch/tpu_create.sh NAME --type TYPE --bucket gs://B (see --help)"
  [[ -n $type ]] || fail "no --type: an accelerator type such as v5litepod-16 (see --help)"
  [[ $type =~ ^[a-z0-9]+-[1-9][0-9]*$ ]] || fail "--type $type: expected GENERATION-SIZE, as v6e-16"
  [[ -n $bucket ]] || fail "no --bucket: gs://BUCKET keeps what must survive the pod (see --help)"
}

# https://cloud.google.com/tpu/docs/runtimes#pytorch_and_jax
default_runtime() {
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    tpu7x-*) fail "--type $type: Google offers Ironwood through GKE only: docs/tpu.md, 'GKE'" ;;
    *) fail "--type $type: name its --runtime-version (gcloud compute tpus versions list)" ;;
  esac
}

check_account() {
  gc auth list --filter=status:ACTIVE '--format=value(account)' || explain "list the accounts"
  [[ -n $dry || -s $tmp/out ]] || fail "gcloud has no account: run 'gcloud auth login'"
  if [[ -z $project ]]; then
    gc config get-value project || true
    project=$(if [[ -n $dry ]]; then echo PROJECT; else cat "$tmp/out"; fi)
    [[ -n $project ]] || fail "no project: give --project, or 'gcloud config set project PROJECT'"
  fi
  if [[ -z $zone ]]; then
    gc config get-value compute/zone || true
    zone=$(if [[ -n $dry ]]; then echo ZONE; else cat "$tmp/out"; fi)
    [[ -n $zone ]] || fail "no zone: give --zone, or 'gcloud config set compute/zone ZONE'"
  fi
  place=(--zone="$zone" --project="$project")
}

check_type() {
  gc compute tpus accelerator-types list "${place[@]}" '--format=value(type)' || explain "list TPUs"
  [[ -z $dry ]] || return 0
  grep -qxF -e "$type" "$tmp/out" || fail "--type $type is not among those of zone $zone:" \
    "$(sort -V "$tmp/out" | paste -sd ' ')"
}

check_bucket() {
  local location hierarchical
  if ! gc storage buckets describe "$bucket" \
    '--format=value(location,hierarchicalNamespace.enabled)' --raw; then
    case $(<"$tmp/err") in
      *"not found"* | *404*) fail "there is no bucket $bucket: gcloud storage buckets create $bucket" \
        "--location=${zone%-*} --uniform-bucket-level-access --enable-hierarchical-namespace" ;;
      *403* | *PERMISSION_DENIED* | *"does not have"*)
        fail "no permission to read the bucket $bucket ($(gc_error)): ask for the role" \
          "roles/storage.admin there, or for another bucket"
        ;;
      *) fail "cannot look at the bucket $bucket now: $(gc_error)" ;;
    esac
  fi
  [[ -z $dry ]] || return 0
  IFS=$'\t' read -r location hierarchical <"$tmp/out" || true
  [[ $hierarchical == [Tt]rue ]] || fail "$bucket has no hierarchical namespace, so its folders" \
    "cannot be renamed at once: create another one with --enable-hierarchical-namespace"
  [[ ${location,,} == "${zone%-*}" ]] ||
    say "note: $bucket is in ${location,,}, the TPU in ${zone%-*}: transfers are slower and cost money"
}

request() {
  local flags=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices == 1)); then
    flags+=(--node-id="$name")
  else
    flags+=(--node-count="$slices" --node-prefix="$name")
  fi
  [[ -z $spot ]] || flags+=(--spot)
  [[ -z $internal ]] || flags+=(--internal-ips)
  [[ -z $account ]] || flags+=(--service-account="$account")
  [[ -z $give_up_after ]] || flags+=(--valid-until-duration="$give_up_after")
  gc compute tpus queued-resources create "$name" "${place[@]}" "${flags[@]}" "${create_flags[@]}" \
    --quiet || explain "create $name"
}

# What cannot be changed of a pod, one line each.
described() {
  printf '%s\n' "$slices x $type in $zone of $project with $bucket" \
    "$([[ -n $spot ]] && echo spot || echo on demand)" \
    "${account:+service account }${account:-the default service account}" "runtime $runtime" \
    "$([[ -n $internal ]] && echo internal || echo external) addresses" \
    "flags ${create_flags[*]:-none}"
}

# A pod of this name that was requested from here otherwise, and is still there, is an error: what
# follows would take it for one that is gone, and request it anew as what it is not.
check_existing() {
  local wanted old at differs=''
  [[ -s $pod/options ]] || return 0
  mapfile -t wanted < <(described)
  old=$(
    load_pod
    described
    look
    echo "$state"
  ) || exit 1
  mapfile -t old <<<"$old"
  [[ ${old[-1]} != gone ]] || return 0
  for at in "${!wanted[@]}"; do
    [[ ${old[at]} == "${wanted[at]}" ]] || differs+="; ${old[at]}, not ${wanted[at]}"
  done
  [[ -z $differs ]] || fail "$name exists: ${differs:2}. Choose another name, or" \
    "'launch/tpu_delete.sh $name' first"
}

# One that was requested from another machine stays as it is; where that is not as asked, it says so.
check_foreign() {
  local found is by tier spec='tpu.nodeSpec[].node' count=multisliceParams.nodeCount
  # Of other slices it seems to have lost its nodes: they have other names.
  [[ ! -s $pod/options && ($state != gone || $why == "node "*" is gone") ]] || return 0
  gc compute tpus queued-resources describe "$name" "${place[@]}" \
    --format="value($spec.acceleratorType,$spec.serviceAccount.email,${spec%.*}.$count)" ||
    explain "look at $name"
  found=$(cut -f 3 "$tmp/out")
  found="${found:-1} x $(cut -f 1 "$tmp/out")" by=$(cut -f 2 "$tmp/out")
  [[ $found == "$slices x $type" || $found == *" x " ]] || fail "$name exists: $found, not $slices x $type. Choose another" \
    "name, or delete it: this command with --slices and --type as it has them, then" \
    "'launch/tpu_delete.sh $name'"
  gc compute tpus queued-resources describe "$name" "${place[@]}" --format='json(spot)' ||
    explain "look at $name"
  is=$(grep -q '"spot"' "$tmp/out" && echo spot || echo "on demand") # an empty message: no value()
  tier=$([[ -n $spot ]] && echo spot || echo "on demand")
  [[ $is == "$tier" ]] || note_foreign "$is, not $tier"
  [[ -z $account || -z $by || $by == "$account" ]] ||
    note_foreign "with service account $by, not $account"
}

note_foreign() { say "note: $name exists, $1: it stays so until it is requested anew"; }

# tpu_delete.sh leaves its mark first and deletes then: whichever comes first here, no pod is left.
request_unless_deleted() {
  check_not_deleted
  say "requesting $name: ${slices/#1/one} ${type}${spot:+, spot} in $zone"
  request
  if [[ -z $dry && -e $pod/deleted ]]; then
    delete_request
  fi
  check_not_deleted
}

main() {
  parse_options "$@"
  open true
  [[ -n $dry ]] || command -v gcloud >/dev/null ||
    fail "this machine has no gcloud: https://cloud.google.com/sdk/docs/install"
  [[ -n $dry ]] || mkdir -p "$pod"
  lock_pod
  [[ -n $dry || -n $unless_deleted ]] || rm -f "$pod/deleted" # of before: this was given after it
  check_account
  runtime=${runtime:-$(default_runtime)}
  check_type
  check_bucket
  if [[ -n $dry ]]; then
    state=gone why="there is none"
  else
    check_existing
    look
    check_foreign
    save_pod
  fi
  if [[ $state == gone ]]; then
    if [[ $why != "there is none" ]]; then
      say "$name: $why; deleting it to request it again"
      delete_request
    fi
    request_unless_deleted
  fi
  wait_for_pod
  [[ $state == ready ]] || {
    check_not_deleted
    fail "$name cannot be had: $why. Delete it with 'launch/tpu_delete.sh $name', or give the same" \
      "command to ask again"
  }
  [[ -n $dry ]] || say "$name is ACTIVE: ${#node[@]} workers, $((slices * $(devices_of "$type")))" \
    "devices. Next: launch/tpu_setup.sh $name"
}

main "$@"
