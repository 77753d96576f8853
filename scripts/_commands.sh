# shellcheck shell=bash
# Sourced by the launchers: commands that are printed (with $dry) or run, and questions before something is deleted ($name).

# What stands at the top of the script.
usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}
refuse() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || refuse "this needs bash 4.4 or newer; here is $BASH_VERSION"
shopt -s inherit_errexit # a failure inside $(…) counts

# The arguments as a shell reads them.
quote() {
  local argument inner="'\\''" line=''
  for argument in "$@"; do
    [[ $argument =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || argument="'${argument//\'/$inner}'"
    line+=" $argument"
  done
  echo "${line:1}"
}

run() {
  if [ -n "$dry" ]; then
    quote "$@"
  else
    "$@"
  fi
}

# A line of shell, with pipes and redirections.
run_line() {
  if [ -n "$dry" ]; then
    echo "$1"
  else
    bash -o errexit -o pipefail -c "$1"
  fi
}

confirm() {
  local answer
  [ -t 0 ] || refuse "this asks before it deletes; where nobody can answer give --yes"
  read -r -p "$1" answer
  # shellcheck disable=SC2154 # the launcher's
  [ "$answer" = "$name" ] || refuse "nothing was deleted"
}

# progress_in_store PYTHON WORKDIR: the last iteration with a checkpoint, and "done" or "going"; 0 where the store cannot be asked.
progress_in_store() { "$1" -m r2vpo_jax.run.progress "$2" || echo "0 unknown"; }
