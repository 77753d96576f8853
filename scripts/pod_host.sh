#!/usr/bin/env bash
# What scripts/tpu_pod.sh runs on each host of a slice, over ssh, in the home directory. Nobody needs to call it by hand.
#
#   pod_host.sh install COMMIT            r2vpo_jax.tar.gz becomes ~/r2vpo_jax, with .venv on a Python of its own
#   pod_host.sh mark FILE                 leave a file on the disk that all hosts should see
#   pod_host.sh see FILE                  is it there?
#   pod_host.sh start LIMIT GRACE LOGS [NAME=VALUE …] -- COMMAND …   start the run, detached (LIMIT: restarts; LOGS: gs://… or '')
#   pod_host.sh run LIMIT | copy_log      the unit itself: the command in the outer loop; copying its log
#   pod_host.sh status | stop | kill
#   pod_host.sh log LINES [follow]
#
# A run is a transient unit of the user's systemd, not a tmux session: it outlives the connection, gets SIGTERM when the host is shut
# down or preempted (upon which the trainer saves), is stopped gracefully and then by force with one command, and has an exit
# code that can be asked for afterwards.
set -euo pipefail

unit=r2vpo_jax
code=$HOME/r2vpo_jax
state=$HOME/.r2vpo_jax_run # log, status line and command of the last run; not in the checkout, which installs replace
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/run/user/$(id -u)}

say() { echo "$(hostname): $*"; }
refuse() {
  say "error: $*" >&2
  exit 2
}
is_running() { systemctl --user is-active --quiet "$unit"; }

install() {
  ! is_running || refuse "a run is going on here; stop it before its code is replaced"
  mkdir -p "$code"
  cd "$code"
  # What the last archive held and this one does not would still be imported. Weights, data and .venv are not of an archive.
  if [ -f .files ]; then xargs -r -d '\n' rm -f < .files; fi
  tar -xzf ~/r2vpo_jax.tar.gz
  tar -tzf ~/r2vpo_jax.tar.gz | grep -v '/$' > .files
  # The images of TPU VMs have Python 3.10; uv brings one that is new enough.
  python3 -m pip install --user --quiet --disable-pip-version-check 'uv>=0.8,<1'
  local uv=$HOME/.local/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.11 .venv
  "$uv" pip install --quiet --python .venv/bin/python -c constraints.txt -e '.[tpu,gcs,reasoning]'
  echo "$1" > .commit # last: it says that all of this went well
  say "installed $1"
}

mark() {
  mkdir -p "$(dirname "$1")"
  : > "$1"
}

see() {
  local second
  for ((second = 0; second < ${SEE_SECONDS:-70}; second++)); do # network disks remember for a minute that a file was not there
    [ ! -e "$1" ] || return 0
    sleep 1
  done
  refuse "$1, written by worker 0, is not here: the --workdir is not on a disk that all hosts see"
}

start() {
  local limit=$1 grace=$2 logs=$3 settings=() command
  shift 3
  while [ "$1" != -- ]; do
    settings+=(--setenv="$1")
    shift
  done
  shift
  [ -f "$code/.commit" ] || refuse "nothing is installed here; first: tpu_pod.sh install"
  command=$(printf '%q ' "$@")
  if is_running; then
    [ "$(cat "$state/command")" = "$command" ] || refuse "another run is going on here; stop it first"
    say "runs already"
    return
  fi
  mkdir -p "$state"
  rm -f "$state/log.previous" "$state/status"
  [ ! -f "$state/log" ] || mv "$state/log" "$state/log.previous"
  echo "$command" > "$state/command"
  echo "$logs" > "$state/logs_to"
  # Without lingering, systemd ends a user's units when the last connection closes.
  sudo loginctl enable-linger "$(id -un)"
  systemctl --user reset-failed "$unit" 2> /dev/null || true # there is none to reset on a first start
  local after=()
  if [ -n "$logs" ]; then after=(--property="ExecStopPost=/bin/bash $code/scripts/pod_host.sh copy_log"); fi
  # KillMode=mixed: only the outer loop is sent SIGTERM. It passes it on; a trainer that heard it twice would not save.
  systemd-run --user --quiet --unit="$unit" --working-directory="$code" \
    --property=KillMode=mixed --property=TimeoutStopSec="$grace" --property=SuccessExitStatus="143 130" \
    --property=StandardOutput="append:$state/log" --property=StandardError="append:$state/log" "${after[@]}" \
    --setenv=PYTHONUNBUFFERED=1 --setenv=PATH="$code/.venv/bin:$PATH" "${settings[@]}" \
    -- /bin/bash "$code/scripts/pod_host.sh" run "$limit"
  say "started"
}

# The main process of the unit. The command comes from a file: systemd would replace each $ in an argument.
run() {
  local limit=$1
  eval "set -- $(cat "$state/command")" # quoted by printf %q
  if [ -n "$(cat "$state/logs_to")" ]; then
    # It ends with the unit, whose last act is one more copy.
    while sleep 60; do copy_log; done &
  fi
  exec bash "$code/scripts/run_until_done.sh" --max-restarts="$limit" --status="$state/status" -- "$@"
}

copy_log() {
  gcloud storage cp --quiet "$state/log" "$(cat "$state/logs_to")/$(hostname).log" \
    || say "the log could not be copied to $(cat "$state/logs_to")" >&2
}

status() {
  local line commit="no code"
  [ ! -f "$code/.commit" ] || commit=$(cut -c1-12 "$code/.commit")
  line=$(cat "$state/status" 2> /dev/null) || line="never started"
  # The line of a run whose host went down still says that it is running.
  if is_running; then
    line="up; $line"
  elif [[ $line == *" running,"* || $line == *" waiting "* ]]; then
    line="gone (the host was restarted, or the run was killed); before: $line"
  fi
  say "$commit; $line"
}

stop() {
  if is_running; then
    systemctl --user stop "$unit" # SIGTERM; SIGKILL after the grace given at the start
  fi
  status
}

kill_now() {
  if is_running; then
    systemctl --user kill --signal=SIGKILL "$unit"
  fi
  status
}

log() {
  [ -f "$state/log" ] || refuse "no run was started here"
  if [ "${2:-}" = follow ]; then exec tail -n "$1" -F "$state/log"; fi
  tail -n "$1" "$state/log"
}

action=$1
shift
case "$action" in
  install | mark | see | start | run | copy_log | status | stop | log) "$action" "$@" ;;
  kill) kill_now ;;
  *) refuse "unknown action $action" ;;
esac
