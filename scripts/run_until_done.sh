#!/usr/bin/env bash
# Run a training command until its run is done, however often it has to be started.
#
#   bash scripts/run_until_done.sh [OPTIONS] -- python -m experiments.train --config=… --workdir=/shared/run …
#
# A command that is killed or ends with an error is started again, after a pause; the trainer goes on from its last intact
# checkpoint. What ends it, and the exit code:
#   0           the run is done: the command ended with 0, and WORKDIR/report/summary.json is there. Without a --workdir, or with
#               --stop_after_iteration, 0 alone is enough
#   2           the command refused its input (exit code 2): starting it again would not help
#   126, 127    the command cannot be started
#   143, 130    SIGTERM or SIGINT came. It is passed on once, the command saves and ends, and this waits for it. Not 0 although
#               all is saved: whoever restarts what failed must not take the run for done
#   otherwise   that of the last try: there were --max-restarts, or --max-fruitless in a row without a newer checkpoint
#               (75: another process of the run is missing or gone)
#
# Options:
#   --max-restarts=N     restarts in all (default 100; 0: one try)
#   --max-fruitless=N    tries in a row without a newer checkpoint (default 5)
#   --wait=SECONDS       the first pause (default 10); it doubles with each fruitless try
#   --max-wait=SECONDS   the longest pause (default 300)
#   --settle=SECONDS     how long to wait for the summary after an exit code of 0 (default 30; process 0 writes it, others see it later)
#   --status=FILE        one line, kept up to date: running, waiting or ended, and why
set -uo pipefail

source "$(dirname "$0")/_commands.sh"

max_restarts=100 max_fruitless=5 wait=10 max_wait=300 settle=30 status=''
while [ $# -gt 0 ]; do
  case "$1" in
    --max-restarts=*) max_restarts=${1#*=} ;;
    --max-fruitless=*) max_fruitless=${1#*=} ;;
    --wait=*) wait=${1#*=} ;;
    --max-wait=*) max_wait=${1#*=} ;;
    --settle=*) settle=${1#*=} ;;
    --status=*) status=${1#*=} ;;
    --help | -h) usage ;;
    --) shift && break ;;
    *) refuse "unknown option $1 (--help lists them; the command comes after --)" ;;
  esac
  shift
done
[ $# -gt 0 ] || refuse "no command: … -- python -m experiments.train --config=… --workdir=… (--help says more)"
for number in "$max_restarts" "$max_fruitless" "$wait" "$max_wait" "$settle"; do
  [[ $number =~ ^[0-9]+$ ]] || refuse "'$number' is not a whole number"
done
[ "$max_fruitless" -gt 0 ] || refuse "--max-fruitless must be at least 1"

workdir='' partial='' previous=''
for argument in "$@"; do
  case "$argument" in
    --workdir=* | -workdir=*) workdir=${argument#*=} ;;
    --stop_after_iteration*) partial=yes ;;
  esac
  case "$previous" in --workdir | -workdir) workdir=$argument ;; esac
  previous=$argument
done

tell() {
  echo "run_until_done: $*" >&2
  [ -z "$status" ] || echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*" > "$status"
}
case "$(basename "$1")" in python*) python=$1 ;; *) python=.venv/bin/python ;; esac
# The last iteration with a committed checkpoint, 0 without one.
newest() {
  local file name last=0
  [ -n "$workdir" ] || { echo 0 && return; }
  case "$workdir" in gs://*) progress_in_store "$python" "$workdir" | cut -d ' ' -f 1 && return ;; esac
  for file in "$workdir"/checkpoints/manifests/*.json; do
    name=$(basename "$file" .json)
    if [[ $name =~ ^[0-9]+$ ]] && [ "$name" -gt "$last" ]; then last=$name; fi
  done
  echo "$last"
}
is_done() {
  local second
  [ -n "$workdir" ] && [ -z "$partial" ] || return 0
  for ((second = 0; ; second++)); do
    case "$workdir" in
      gs://*) [ "$(progress_in_store "$python" "$workdir" | cut -d ' ' -f 2)" != "done" ] || return 0 ;;
      *) [ ! -e "$workdir/report/summary.json" ] || return 0 ;;
    esac
    [ "$second" -lt "$settle" ] && [ -z "$signal" ] || return 1
    sleep 1
  done
}
end() {
  tell "ended with $1: $2"
  exit "$1"
}

signal='' child='' interrupted='' told=''
# shellcheck disable=SC2317,SC2329 # called by the traps
on_signal() {
  interrupted=yes
  if [ -n "$signal" ]; then
    echo "run_until_done: SIG$1 again; the command was told already, and is waited for" >&2
    return
  fi
  signal=$1
  tell_child
}
# Once, whether the signal came before there was a child or after.
tell_child() {
  [ -n "$signal" ] && [ -n "$child" ] && [ -z "$told" ] || return 0
  told=yes
  kill -s "$signal" "$child" 2> /dev/null || true # it may have ended by itself
}
trap 'on_signal TERM' TERM
trap 'on_signal INT' INT

# await: the exit code of $child. A signal ends `wait`, but not the child.
await() {
  while :; do
    interrupted=
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || break
  done
  child=
}

restarts=0 fruitless=0 pause=$wait
while :; do
  before=$(newest)
  tell "running, start $((restarts + 1)), from iteration $before"
  # In a process group of its own: Ctrl-C in a terminal reaches this script alone, and the command hears of it once.
  set -m
  "$@" < /dev/null &
  child=$!
  set +m
  tell_child
  await
  after=$(newest)
  if [ "$code" -eq 0 ] && is_done; then end 0 "the run is done"; fi
  case "$signal" in
    TERM) end 143 "stopped by SIGTERM after iteration $after; the same command goes on from there" ;;
    INT) end 130 "stopped by SIGINT after iteration $after; the same command goes on from there" ;;
  esac
  case "$code" in
    2) end 2 "the command refused its input; see its message above" ;;
    126 | 127) end "$code" "the command cannot be started" ;;
    130) end 130 "the command was interrupted" ;;
  esac
  if [ "$code" -eq 0 ]; then
    why="stopped and saved after iteration $after, by a signal to it or to another process of the run"
    failure=1 # what this exits with if it gives up: the run is not done
  elif [ "$code" -eq 75 ]; then
    why="another process of the run is missing or gone (exit code 75), after iteration $after" failure=$code
  else
    why="exit code $code after iteration $after" failure=$code
  fi
  if [ "$after" -gt "$before" ]; then
    fruitless=0 pause=$wait
  else
    fruitless=$((fruitless + 1))
  fi
  [ "$fruitless" -lt "$max_fruitless" ] || end "$failure" "$why; $fruitless tries in a row without a newer checkpoint"
  [ "$restarts" -lt "$max_restarts" ] || end "$failure" "$why; no restarts left (--max-restarts=$max_restarts)"
  restarts=$((restarts + 1))
  [ "$pause" -le "$max_wait" ] || pause=$max_wait
  tell "waiting $pause s before start $((restarts + 1)): $why"
  sleep "$pause" &
  child=$!
  tell_child
  await
  case "$signal" in
    TERM) end 143 "stopped by SIGTERM between two tries" ;;
    INT) end 130 "stopped by SIGINT between two tries" ;;
  esac
  [ "$fruitless" -eq 0 ] || pause=$((pause * 2))
done
