# shellcheck shell=bash
# Sourced by the launchers: commands that are printed (with $dry) or run, and questions before something is deleted ($name).

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
