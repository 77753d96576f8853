#!/usr/bin/env bash
# One run on a TPU slice of a GKE cluster, as a JobSet. docs/pods.md goes through it step by step.
#
#   bash scripts/gke_jobset.sh image  NAME --image=REGISTRY/r2vpo_jax:TAG       build HEAD of this checkout, and push it
#   bash scripts/gke_jobset.sh launch NAME --image=… --accelerator=tpu-v5p-slice --topology=2x2x2 --hosts=2 --claim=CLAIM \
#       -- --config=… --workdir=/shared/run …
#   bash scripts/gke_jobset.sh status NAME
#   bash scripts/gke_jobset.sh logs   NAME [--worker=0] [--lines=50] [--follow]
#   bash scripts/gke_jobset.sh stop   NAME      SIGTERM, upon which the run saves; `launch` goes on
#   bash scripts/gke_jobset.sh delete NAME [--yes]
#
# Options of all commands:
#   --namespace=NAMESPACE, --context=CONTEXT   default: as kubectl is configured
#   --dry-run                                  print every command as it would be run, and run none
# Of launch:
#   --image=IMAGE            made by `image`
#   --accelerator, --topology, --hosts, --chips (a host; default 4)   as the node pool has them
#   --claim=CLAIM            a PersistentVolumeClaim, ReadWriteMany; it becomes /shared on all hosts
#   --spot                   on spot nodes
#   --restarts=N             when a pod is preempted or fails (default 50)
set -euo pipefail

source "$(dirname "$0")/_commands.sh"

case "${1:-}" in
  image | launch | status | logs | stop | delete) action=$1 ;;
  *) usage ;;
esac
[ $# -ge 2 ] || usage
name=$2
[[ $name =~ ^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$ ]] || refuse "'$name' cannot be the name of a JobSet: up to 32 small letters, digits and dashes"
shift 2

where=() training=()
dry='' image='' accelerator='' topology='' hosts='' chips=4 claim='' spot='' restarts=50 worker=0 lines=50 follow='' yes=''
while [ $# -gt 0 ]; do
  case "$action $1" in
    *" --namespace="* | *" --context="*) where+=("$1") ;;
    *" --dry-run") dry=yes ;;
    "image --image="* | "launch --image="*) image=${1#*=} ;;
    "launch --accelerator="*) accelerator=${1#*=} ;;
    "launch --topology="*) topology=${1#*=} ;;
    "launch --hosts="*) hosts=${1#*=} ;;
    "launch --chips="*) chips=${1#*=} ;;
    "launch --claim="*) claim=${1#*=} ;;
    "launch --spot") spot=yes ;;
    "launch --restarts="*) restarts=${1#*=} ;;
    "launch --") shift && training=("$@") && break ;;
    "logs --worker="*) worker=${1#*=} ;;
    "logs --lines="*) lines=${1#*=} ;;
    "logs --follow") follow=--follow ;;
    "delete --yes") yes=yes ;;
    *) refuse "$action has no option $1 (bash scripts/gke_jobset.sh lists them)" ;;
  esac
  shift
done
cd "$(dirname "$0")/.."

image() {
  [ -n "$image" ] || refuse "image needs --image=REGISTRY/r2vpo_jax:TAG"
  run_line "git archive --format=tar HEAD | $(quote docker build --file=scripts/gke/Dockerfile --tag="$image" -)"
  run docker push "$image"
}

# A string of YAML, which JSON's are.
string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  [[ $text != *[[:cntrl:]]* ]] || refuse "the flags hold a line break or a control character: put such a value into a config file"
  # Kubernetes replaces $(NAME) in arguments, and makes $ of $$.
  echo "\"${text//\$/\$\$}\""
}
# The manifest on stdout.
manifest() {
  local text argument arguments selector=''
  arguments='["--max-restarts=0", "--", "python", "-m", "experiments.train"'
  for argument in "${training[@]}"; do arguments+=", $(string "$argument")"; done
  if [ -n "$spot" ]; then selector='                cloud.google.com/gke-spot: "true"'; fi
  text=$(grep -v '^# ' scripts/gke/jobset.yaml)
  text=${text//@NAME@/"$name"}
  text=${text//@RESTARTS@/"$restarts"}
  text=${text//@HOSTS@/"$hosts"}
  text=${text//@ACCELERATOR@/"$accelerator"}
  text=${text//@TOPOLOGY@/"$topology"}
  text=${text//@CHIPS@/"$chips"}
  text=${text//@CLAIM@/"$claim"}
  text=${text//@IMAGE@/"$image"}
  text=${text//@SPOT@/"$selector"}
  text=${text//@ARGS@/"$arguments]"}
  grep -v '^$' <<< "$text"
}

launch() {
  local field argument workdir='' file=.cache/pod/$name.yaml text
  for field in image accelerator topology claim; do
    [[ ${!field} =~ ^[A-Za-z0-9_./:@-]+$ ]] || refuse "launch needs --$field=, and '${!field}' is none"
  done
  for field in hosts chips restarts; do
    [[ ${!field} =~ ^[0-9]+$ ]] || refuse "launch needs --$field=, a whole number, and '${!field}' is none"
  done
  for argument in "${training[@]}"; do
    case "$argument" in --workdir=*) workdir=${argument#*=} ;; esac
  done
  case "$workdir" in
    /shared/?* | gs://?*) ;;
    *) refuse "the run needs --workdir=/shared/… or gs://BUCKET/NAME: the claim is mounted there, and the pods' own disks are gone with them" ;;
  esac
  text=$(manifest)
  run_line "mkdir -p .cache/pod
cat > $file << 'END'
$text
END"
  run kubectl apply "${where[@]}" --filename="$file"
  # After `stop` it is there, suspended.
  run kubectl patch jobset "$name" "${where[@]}" --type=merge --patch='{"spec":{"suspend":false}}'
}

status() {
  run kubectl get jobset "$name" "${where[@]}" --output=wide
  run kubectl get pods "${where[@]}" --selector="jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

logs() {
  # shellcheck disable=SC2086 # no argument when empty
  run kubectl logs "${where[@]}" --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=$worker" \
    --tail="$lines" $follow
}

stop() { run kubectl patch jobset "$name" "${where[@]}" --type=merge --patch='{"spec":{"suspend":true}}'; }

delete() {
  [ -n "$yes" ] || [ -n "$dry" ] || confirm "Delete the JobSet $name? What is in its claim stays. Type its name: "
  run kubectl delete jobset "$name" "${where[@]}" --ignore-not-found
}

"$action"
