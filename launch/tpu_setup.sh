#!/usr/bin/env bash
# Puts this checkout on every worker of a pod: see --help and docs/tpu.md.
set -euo pipefail
export LC_ALL=C

usage() {
  cat <<'HELP'
usage: launch/tpu_setup.sh NAME [--dry-run]

On every worker of the pod NAME (launch/tpu_create.sh): installs the wheel built from this checkout, with
jax[tpu] and the pins of requirements/, mounts the bucket, and counts the devices from all workers
together. A pod that has just this checkout is left as it is.

Environment:
  MEMPHIS_PYTHON      builds the wheel (default: .venv/bin/python of this checkout, or python3)
  MEMPHIS_TPU_PYTHON  an interpreter on the workers that has all packages already (an image of
                      your own): only the wheel is installed, beside it
HELP
}

# shellcheck source-path=SCRIPTDIR source=tpu_workers.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_workers.sh"

parse_options() {
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
}

build_wheel() {
  local call=("$(own_python)" -m pip wheel --quiet --no-deps --wheel-dir "$tmp/wheel" "$checkout")
  wheel=$tmp/wheel/memphis_jax-VERSION-py3-none-any.whl
  if [[ -n $dry ]]; then
    shown "${call[@]}"
    return
  fi
  say "building the wheel"
  child "$tmp/none" "${call[@]}" >"$tmp/out" 2>"$tmp/err" || fail "cannot build the wheel: $(last_error)"
  wheel=$(echo "$tmp"/wheel/*.whl)
}

# Any command by ssh: before tpu_remote.sh is there.
command_on() {
  local words
  ssh_words "$1" "$2"
  run_gcloud "$1" "${words[@]}"
}

copy_to() {
  local words=(compute tpus tpu-vm scp "$wheel" "$here/tpu_remote.sh" "$here/tpu_devices.py"
    "$checkout/requirements/py312.txt" "${node[$1]}:memphis/" "${place[@]}"
    --worker="${worker[$1]}" --quiet --scp-flag=-oConnectTimeout=15)
  [[ -z $internal ]] || words+=(--internal-ip)
  run_gcloud "$1" "${words[@]}"
}

run_gcloud() {
  if [[ -n $dry ]]; then
    shown gcloud "${@:2}"
    return
  fi
  child "$tmp/none" gcloud "${@:2}" >"$tmp/worker/$1.out" 2>"$tmp/worker/$1.err"
}

# The first connection makes the ssh key and tells the pod of it: once, not from all at a time.
first_contact() {
  mkdir -p "$tmp/worker"
  command_on 0 "mkdir -p memphis" || {
    cp "$tmp/worker/0.err" "$tmp/err"
    fail "cannot reach $(label 0) by ssh: $(gc_error). Without external addresses: --internal-ips" \
      "from a machine in the same network; behind a firewall: allow tcp:22"
  }
}

main() {
  parse_options "$@"
  open true
  lock_pod
  wait_for_pod
  [[ $state == ready ]] || fail "$name is not there ($why): launch/tpu_create.sh $name"
  local stamp
  stamp=$(stamp_of_checkout)
  first_contact
  on_all remote state "$mount"
  if [[ -z $dry ]]; then
    ! any_running >/dev/null || fail "a job runs on $name: wait for it (launch/tpu_status.sh $name)," \
      "or stop it with 'launch/tpu_run.sh $name --stop'"
    if all_have "$stamp"; then
      say "$name has this checkout"
      return
    fi
  fi
  build_wheel
  say "installing on ${#node[@]} workers of $name"
  on_all command_on "mkdir -p memphis"
  must_all "make a folder"
  on_all copy_to
  must_all "receive the wheel"
  on_all remote install "$stamp" "${wheel##*/}" "${MEMPHIS_TPU_PYTHON-}"
  must_all "install the wheel"
  on_all remote mount "${bucket#gs://}" "$mount"
  must_all "mount $bucket"
  say "counting the devices"
  child "$tmp/none" "$here/tpu_run.sh" "$name" ${dry:+--dry-run} --as-is -- python tpu_devices.py \
    "$((slices * $(devices_of "$type")))"
  on_all remote stamp "$stamp"
  must_all "note what it has"
  [[ -n $dry ]] || say "$name is set up. Next: launch/tpu_run.sh $name -- COMMAND, or launch/recipe.sh $name ..."
}

main "$@"
