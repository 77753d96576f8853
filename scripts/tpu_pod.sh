#!/usr/bin/env bash
# A slice of Cloud TPUs, from nothing to a run to nothing. Run it on your own machine; docs/pods.md goes through it step by step.
#
#   bash scripts/tpu_pod.sh create  NAME --accelerator-type=v5p-16 [--queued] [--spot | --reserved] [--wait]
#   bash scripts/tpu_pod.sh install NAME      HEAD of this checkout, and Python packages, on every host
#   bash scripts/tpu_pod.sh launch  NAME [--until-done] [--env=NAME=VALUE] [--logs-to=gs://…] -- --config=… --workdir=/shared/run …
#   bash scripts/tpu_pod.sh status  NAME      the slice, and the run on each host
#   bash scripts/tpu_pod.sh logs    NAME [--worker=0] [--lines=50] [--follow]
#   bash scripts/tpu_pod.sh stop    NAME [--force]
#   bash scripts/tpu_pod.sh delete  NAME [--yes]
#
# Every command may be given twice: what is done already is not done again. Options of all commands:
#   --zone=ZONE, --project=PROJECT   default: as gcloud is configured
#   --ssh-with=FLAG                  a further flag of gcloud … ssh and scp, for example --ssh-with=--internal-ip; may be repeated
#   --dry-run                        print every command as it would be run, and run none. What gcloud would have answered is assumed:
#   --workers=N                      so many hosts (default 2)
# Of create:
#   --accelerator-type=TYPE          v5litepod-16, v5p-16, v6e-16, …
#   --runtime-version=VERSION        default: the one that Google names for the type
#   --queued                         a queued resource: it waits for capacity. --wait: until it is there
#   --spot, --reserved               cheaper and preemptible; from your reservation
#   --create-with=FLAG               a further flag of gcloud … create, for example --create-with=--internal-ips; may be repeated
# Of install:
#   --allow-dirty                    although there are changes that are not committed, and so not sent
# Of launch:
#   --until-done[=N]                 start it again when it fails, up to N times (default 100; scripts/run_until_done.sh)
#   --module=MODULE                  default: experiments.train
#   --env=NAME=VALUE                 an environment variable of the run; may be repeated
#   --grace=SECONDS                  between SIGTERM and SIGKILL (default 600: an iteration and a checkpoint must fit)
#   --logs-to=gs://BUCKET/FOLDER     each host copies its log there every minute, and at the end
set -euo pipefail

source "$(dirname "$0")/_commands.sh"
note() { echo "# $*"; }

case "${1:-}" in
  create | install | launch | status | logs | stop | delete) action=$1 ;;
  *) usage ;;
esac
[ $# -ge 2 ] || usage
name=$2
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || refuse "'$name' cannot be the name of a slice: small letters, digits and dashes"
shift 2

where=() ssh_with=() create_with=() environment=() training=()
dry='' assumed_workers=2 type='' runtime='' queued='' model='' wait='' allow_dirty='' limit=0 module=experiments.train grace=600
logs_to='' worker=0 lines=50 follow='' force='' yes=''
while [ $# -gt 0 ]; do
  case "$action $1" in
    *" --zone="* | *" --project="*) where+=("$1") ;;
    *" --ssh-with="*) ssh_with+=("${1#*=}") ;;
    *" --dry-run") dry=yes ;;
    *" --workers="*) assumed_workers=${1#*=} ;;
    "create --accelerator-type="*) type=${1#*=} ;;
    "create --runtime-version="*) runtime=${1#*=} ;;
    "create --queued") queued=yes ;;
    "create --wait") wait=yes ;;
    "create --spot" | "create --reserved") model=$1 ;;
    "create --create-with="*) create_with+=("${1#*=}") ;;
    "install --allow-dirty") allow_dirty=yes ;;
    "launch --until-done") limit=100 ;;
    "launch --until-done="*) limit=${1#*=} ;;
    "launch --module="*) module=${1#*=} ;;
    "launch --env="*=*) environment+=("${1#*=}") ;;
    "launch --grace="*) grace=${1#*=} ;;
    "launch --logs-to="*) logs_to=${1#*=} && logs_to=${logs_to%/} ;;
    "launch --") shift && training=("$@") && break ;;
    "logs --worker="*) worker=${1#*=} ;;
    "logs --lines="*) lines=${1#*=} ;;
    "logs --follow") follow=follow ;;
    "stop --force") force=yes ;;
    "delete --yes") yes=yes ;;
    *) refuse "$action has no option $1 (bash scripts/tpu_pod.sh lists them)" ;;
  esac
  shift
done
for number in "$assumed_workers" "$limit" "$grace" "$worker" "$lines"; do
  [[ $number =~ ^[0-9]+$ ]] || refuse "'$number' is not a whole number"
done
cd "$(dirname "$0")/.."

# Commands: printed or run -------------------------------------------------------------------------------------

# ask VARIABLE ASSUMED COMMAND …: what the command prints; ASSUMED where nothing is run.
ask() {
  local -n into=$1
  if [ -n "$dry" ]; then
    quote "${@:3}"
    into=$2
    note "assumed: ${2:-nothing}" | tr '\n' ' ' && echo
  else
    # shellcheck disable=SC2034 # the caller's variable
    into=$("${@:3}") || refuse "gcloud could not be asked: $(quote "${@:3}")"
  fi
}

tpus=(gcloud compute tpus)
ssh_to() { run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker="$1" "${ssh_with[@]}" --command="$2"; }
on_host() { quote bash r2vpo_jax/scripts/pod_host.sh "$@"; }
# The states of what has this name; empty where there is nothing.
look() {
  local filter="name~\"(^|/)$name\$\""
  ask queued_state "$1" "${tpus[@]}" queued-resources list "${where[@]}" --filter="$filter" --format='value(state.state)'
  ask vm_state "$2" "${tpus[@]}" tpu-vm list "${where[@]}" --filter="$filter" --format='value(state)'
}
# Sets `workers`, the number of hosts.
count_workers() {
  local addresses
  addresses=$(for ((i = 0; i < assumed_workers; i++)); do echo "10.0.0.$i"; done)
  ask addresses "$addresses" "${tpus[@]}" tpu-vm describe "$name" "${where[@]}" \
    --flatten='networkEndpoints[]' --format='value(networkEndpoints.ipAddress)'
  workers=$(wc -l <<< "$addresses")
}
need_ready() {
  look "" READY
  [ "$vm_state" = READY ] || refuse "the slice $name is ${vm_state:-not there}${queued_state:+, its queued resource is $queued_state}; $after_loss"
  count_workers
}
after_loss="if it was preempted: delete, create and install it again, and launch the same command, which goes on from the last checkpoint in its --workdir"

# The actions --------------------------------------------------------------------------------------------------

create() {
  [ -n "$type" ] || refuse "create needs --accelerator-type=, for example v5litepod-16, v5p-16 or v6e-16"
  if [ -z "$runtime" ]; then
    case "$type" in
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
      *) refuse "give --runtime-version= for $type (https://cloud.google.com/tpu/docs/runtimes)" ;;
    esac
  fi
  look "" ""
  case "$vm_state$queued_state" in
    "") ;;
    *PREEMPTED* | *SUSPEND* | *FAILED* | *TERMINATED* | *STOPPED* | *DELETING*)
      refuse "$name is there, but ${vm_state:-no slice}${queued_state:+, queued resource $queued_state}; delete it first" ;;
    *)
      note "$name is there already: ${vm_state:-no slice yet}${queued_state:+, queued resource $queued_state}"
      if [ -n "$wait" ]; then await_ready; fi
      return ;;
  esac
  local options=("${where[@]}" --accelerator-type="$type")
  if [ -n "$model" ]; then create_with+=("$model"); fi
  if [ -n "$queued" ]; then
    run "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${options[@]}" --runtime-version="$runtime" "${create_with[@]}" \
      || fail_to_create "$?"
    note "queued; it is paid for as soon as it is there: 'status' says when, 'delete' ends both"
  else
    run "${tpus[@]}" tpu-vm create "$name" "${options[@]}" --version="$runtime" "${create_with[@]}" || fail_to_create "$?"
    note "it is paid for from now on, until 'delete'"
  fi
  if [ -n "$wait" ]; then await_ready; fi
}

fail_to_create() {
  echo "error: the slice was not created (gcloud's message is above). No capacity: try --queued --wait, another zone, or --spot. No quota: \
https://cloud.google.com/tpu/docs/quota" >&2
  exit "$1"
}

await_ready() {
  while :; do
    look "${queued:+ACTIVE}" READY
    case "$vm_state $queued_state" in
      "READY "*) return ;;
      *FAILED* | *SUSPEND* | *PREEMPTED* | *TERMINATED*)
        echo "error: $name will not come: ${vm_state:-no slice}${queued_state:+, queued resource $queued_state}; delete it" >&2
        exit 1 ;;
    esac
    note "$(date -u +%H:%M:%SZ) ${vm_state:-no slice yet}${queued_state:+, queued resource $queued_state}"
    sleep "${TPU_POD_POLL_SECONDS:-30}"
  done
}

install() {
  local changes commit archive=.cache/pod/r2vpo_jax.tar.gz i
  changes=$(git status --porcelain --untracked-files=no)
  if [ -n "$changes" ] && [ -z "$allow_dirty" ] && [ -z "$dry" ]; then
    refuse "these changes are not committed, and HEAD is what is sent; commit them, or give --allow-dirty: $(tr '\n' ' ' <<< "$changes")"
  fi
  [ -z "$changes" ] || note "warning: changes that are not committed are not sent"
  commit=$(git rev-parse HEAD)
  need_ready
  # Keys reach the hosts one by one; --worker=all fails before they have.
  for ((i = 0; i < workers; i++)); do ssh_to "$i" true; done
  run mkdir -p .cache/pod
  run git archive --format=tar.gz -o "$archive" "$commit"
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:r2vpo_jax.tar.gz" "${where[@]}" --worker=all "${ssh_with[@]}"
  ssh_to all "tar -xzOf r2vpo_jax.tar.gz scripts/pod_host.sh > pod_host.sh && bash pod_host.sh install $commit"
}

launch() {
  local argument workdir='' mark
  for argument in "${training[@]}"; do
    case "$argument" in --workdir=*) workdir=${argument#*=} ;; esac
  done
  [ "${#training[@]}" -gt 0 ] || refuse "the flags of the run come after --: … launch $name -- --config=… --workdir=/shared/run"
  case "$workdir" in
    "") refuse "the run needs --workdir=gs://BUCKET/NAME, or /a/full/path on a disk that all hosts see" ;;
    gs://?*) ;;
    *:/*) refuse "--workdir=$workdir: of addresses, only gs://BUCKET/NAME will do (docs/pods.md)" ;;
    /*) ;;
    *) refuse "--workdir=$workdir: give a full path" ;;
  esac
  case "$logs_to" in "" | gs://?*) ;; *) refuse "--logs-to=$logs_to does not begin with gs://" ;; esac
  need_ready
  if [ "$workers" -gt 1 ] && [[ $workdir == /* ]]; then
    # The run finds out itself, into the hosts' logs: here it is said at once.
    mark=$workdir/.seen_by_all_hosts
    [ -n "$dry" ] || mark+=.$RANDOM$RANDOM
    ssh_to 0 "$(on_host mark "$mark")" || {
      echo "error: worker 0 could not write to $workdir (is the code installed? is the disk mounted?)" >&2
      exit 1
    }
    ssh_to all "$(on_host see "$mark")"
    ssh_to 0 "$(quote rm -f "$mark")"
  fi
  ssh_to all "$(on_host start "$limit" "$grace" "$logs_to" "${environment[@]}" -- python -m "$module" "${training[@]}")" || {
    echo "error: the run is not started on all hosts, and the others wait for the missing ones: launch again, or stop" >&2
    exit 1
  }
}

status() {
  local i unreachable=0
  look "" READY
  note "slice: ${vm_state:-none}${queued_state:+; queued resource: $queued_state}"
  case "$vm_state $queued_state" in
    "READY "*) ;;
    *SUSPEND* | *PREEMPTED* | *FAILED* | *TERMINATED*)
      note "$after_loss"
      exit 1 ;;
    *) exit 1 ;;
  esac
  count_workers
  for ((i = 0; i < workers; i++)); do
    ssh_to "$i" "$(on_host status)" || {
      echo "worker $i: cannot be asked"
      unreachable=$((unreachable + 1))
    }
  done
  [ "$unreachable" -eq 0 ]
}

logs() {
  # shellcheck disable=SC2086 # no argument when empty
  ssh_to "$worker" "$(on_host log "$lines" $follow)"
}

stop() {
  if [ -n "$force" ]; then
    ssh_to all "$(on_host kill)"
  else
    ssh_to all "$(on_host stop)"
  fi
}

delete() {
  look "" READY
  if [ -z "$vm_state$queued_state" ]; then
    note "there is no $name"
    return
  fi
  if [ -z "$yes" ] && [ -z "$dry" ]; then
    confirm "Delete $name (${vm_state:-no slice}${queued_state:+, queued resource $queued_state}) and all that is on its disks? Type its name: "
  fi
  if [ -n "$queued_state" ]; then
    run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  else
    run "${tpus[@]}" tpu-vm delete "$name" "${where[@]}" --quiet
  fi
  look "" ""
  if [ -n "$vm_state$queued_state" ]; then
    echo "error: $name is still there, and paid for: ${vm_state:-no slice}${queued_state:+, queued resource $queued_state}" >&2
    exit 1
  fi
}

"$action"
