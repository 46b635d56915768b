#!/usr/bin/env bash
# A Cloud TPU VM from request to deletion, with the run kept in a bucket.
#
#   ./launch/tpu_vm.sh create NAME --zone=us-west4-a --type=v5litepod-8 [--spot]
#   ./launch/tpu_vm.sh setup NAME --zone=us-west4-a
#   ./launch/tpu_vm.sh train NAME --zone=us-west4-a --type=v5litepod-8 --bucket=gs://mine/runs/lora \
#       [--spot] [--max_hours=20] [--keep] \
#       -- --config=configs/llama_lora.py --config.data.train=gs://mine/train.csv
#   ./launch/tpu_vm.sh status|logs|fetch|delete NAME --zone=us-west4-a
#
# `train` does all of it: it asks for the VM where there is none, installs the project on every host,
# starts the training command, which keeps its run in the bucket, and makes everything again from
# there when the VM was pre-empted. When training has ended, well or badly, the time is up, or it is
# interrupted, it deletes the VM, so that nothing is left running; `--keep` leaves it. The VM deletes
# itself one hour after --max_hours, if its service account may, so this machine may be switched off.
#
#   --project=P      the Cloud project                       --version=V   the VM's runtime
#   --valid_for=6h   how long a request may wait              --workdir=DIR where `fetch` puts the run
#   --copy=gs://B/X  copied to the project's folder on every host: what the flags name as local
#   --dry_run        prints every command, runs none
#
# Each command is printed before it is run. Flags may stand in PREF_JAX_TPU_ZONE, _PROJECT, _TYPE,
# _BUCKET. Exit code 2: wrong use; 1: it failed; else that of training.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

help() {
  sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${PREF_JAX_TPU_POLL:-60} # seconds
hour=${PREF_JAX_TPU_HOUR:-3600} # seconds; less of them to try what happens when the time is over
outage=${PREF_JAX_TPU_OUTAGE:-1800} # seconds in which Google's cloud may not be reached from here

zone=${PREF_JAX_TPU_ZONE:-}
project=${PREF_JAX_TPU_PROJECT:-}
type=${PREF_JAX_TPU_TYPE:-}
bucket=${PREF_JAX_TPU_BUCKET:-}
version=
valid_for=6h
spot=
max_hours=24
copies=()
workdir=
keep=
dry_run=
training=()

[[ ${1:-} != --help && $# -gt 0 ]] || {
  help
  exit 0
}
action=$1
shift
case $action in
create | setup | train | status | logs | fetch | delete) ;;
*) fail "$action: no such action; create, setup, train, status, logs, fetch or delete" 2 ;;
esac
name=${1:-}
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
  fail "NAME: ${name:-it is missing}; lower case letters, digits and hyphens, as in my-tpu" 2
shift
while (($#)); do
  case $1 in
  --zone=*) zone=${1#*=} ;;
  --project=*) project=${1#*=} ;;
  --type=*) type=${1#*=} ;;
  --bucket=*) bucket=${1#*=} ;;
  --version=*) version=${1#*=} ;;
  --valid_for=*) valid_for=${1#*=} ;;
  --max_hours=*) max_hours=${1#*=} ;;
  --copy=*) copies+=("${1#*=}") ;;
  --workdir=*) workdir=${1#*=} ;;
  --spot) spot=1 ;;
  --keep) keep=1 ;;
  --dry_run) dry_run=1 ;;
  --)
    shift
    training=("$@")
    break
    ;;
  *) fail "$1: no such flag; --help lists them, and training's own stand behind --" 2 ;;
  esac
  shift
done

[[ -n $zone ]] || fail "--zone: it is missing; as in --zone=us-west4-a" 2
if ! [[ $max_hours =~ ^0*[0-9]{1,4}$ ]] || ((10#$max_hours < 1 || 10#$max_hours > 8760)); then
  fail "--max_hours: $max_hours is not a whole number from 1 to 8760" 2
fi
max_hours=$((10#$max_hours))
[[ -z $bucket || $bucket == gs://?* ]] || fail "--bucket: $bucket does not begin with gs://" 2
bucket=${bucket%/}
if [[ $action == create || $action == train ]]; then
  [[ -n $type ]] || fail "--type: it is missing; as in --type=v5litepod-8" 2
fi
if [[ $action == train ]]; then
  [[ -n $bucket ]] || fail "--bucket: it is missing; the run is kept there, as in gs://mine/runs/lora" 2
  ((${#training[@]})) || fail "--: training's flags are missing; as in -- --config=configs/x.py" 2
  [[ " ${training[*]}" != *" --workdir"* ]] ||
    fail "--workdir: the run lies in --bucket; leave it out behind --" 2
fi
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud: it is not installed; see cloud.google.com/sdk" 2

if [[ -z $version ]]; then
  case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
  esac
fi
place=(--zone="$zone")
[[ -z $project ]] || place+=(--project="$project")

# Prints a command, and runs it unless that is not wanted.
run() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  [[ -n $dry_run ]] || "$@"
}

vm() {
  gcloud compute tpus tpu-vm "$@" "${place[@]}"
}

on_hosts() { # WORKERS COMMAND
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"
}

words() { # as one line that a shell reads back as the same words
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Sets `state`: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE where there is no request. Fails
# where that could not be learned, and `reason` is why.
ask() {
  state=$(gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>&1) || {
    reason=${state##*$'\n'}
    [[ $state == *NOT_FOUND* || $state == *"was not found"* ]] || return 1
    state=NONE
  }
  state=${state##*$'\n'} # warnings stand above it
  reason="no answer"
  [[ -n $state ]]
}

# Repeats a question to the cloud until it is answered. An outage here is no news of the VM, which
# may be training: where it does not end, the VM is left alone.
patiently() { # COMMAND...
  local end=$((SECONDS + outage))
  until "$@"; do
    ((SECONDS < end)) || {
      at_stake=
      fail "$name: no answer for $((outage / 60)) minutes ($reason); it may be running and billed; $(remedy)"
    }
    echo "$name: it could not be asked for ($reason); it is asked for again"
    pause
  done
}

remedy() {
  echo "the same command goes on with it, and this deletes it: ./launch/tpu_vm.sh delete $(words "$name" "${place[@]}")"
}

pause() { # in which a signal is heard at once
  sleep "$poll" >/dev/null 2>&1 &
  wait "$!"
}

create() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$version"
    --valid-until-duration="$valid_for" --scopes=cloud-platform)
  [[ -z $spot ]] || options+=(--spot)
  run gcloud compute tpus queued-resources create "$name" "${place[@]}" "${options[@]}"
}

delete() {
  run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

wait_until_active() {
  [[ -z $dry_run ]] || return 0
  while true; do
    patiently ask
    case $state in
    ACTIVE) return 0 ;;
    FAILED | SUSPENDED | SUSPENDING | NONE) return 1 ;;
    esac
    echo "$name: $state"
    pause
  done
}

setup() {
  local archive remote code=0
  archive=$(mktemp -d)/pref_jax.tar.gz
  run git -C "$repository" archive --format=tar.gz --output="$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:pref_jax.tar.gz" "${place[@]}" \
      --worker=all || code=$?
  rm -rf "$(dirname "$archive")"
  ((code == 0)) || return 1
  remote='set -e; mkdir -p pref_jax; tar -xzf pref_jax.tar.gz -C pref_jax; cd pref_jax; '
  remote+='bash -c "source launch/environment.sh && install tpu,gcs"'
  on_hosts all "$remote"
}

start() { # HOURS
  local hours=$1 remote source
  remote="set -e; cd pref_jax; rm -f exit_code; "
  for source in "${copies[@]}"; do
    remote+="gcloud storage cp --recursive $(words "$source") .; "
  done
  # The last resort, should nobody be there to delete the VM.
  remote+="sudo systemctl stop pref_jax_end.timer 2>/dev/null || true; "
  remote+="sudo systemd-run --collect --unit=pref_jax_end --on-active=$((hours + 1))h "
  remote+="gcloud compute tpus queued-resources delete $(words "$name" "${place[@]}") "
  remote+="--force --quiet || true; "
  remote+="setsid nohup bash launch/tpu_host.sh "
  remote+="$(words --workdir="$bucket" --num_hosts=auto --config.train.max_hours="$hours" "${training[@]}") "
  remote+="> train.log 2>&1 < /dev/null &"
  on_hosts all "$remote"
}

exit_code() { # of training on the first host; empty while it goes on
  vm ssh "$name" --worker=0 --command='cat pref_jax/exit_code 2>/dev/null || true' 2>/dev/null
}

# Waits for training. Sets `result` to its exit code, "lost" where the VM is gone or "late".
watch() { # SECONDS, of this script, at which it has to be over
  while true; do
    result=$(exit_code || true)
    [[ ! $result =~ ^[0-9]+$ ]] || return 0
    result=lost
    patiently ask
    [[ $state == ACTIVE ]] || return 0
    result=late
    ((SECONDS < $1)) || return 0
    pause
  done
}

# Sets `answer`: whether training goes on there, yes or no. Fails where the VM, if it is there still,
# did not say, and `reason` is why.
ask_training() {
  answer=$(vm ssh "$name" --worker=0 \
    --command="kill -0 \"\$(cat pref_jax/host_pid)\" 2>/dev/null && echo yes || echo no" 2>/dev/null)
  [[ $answer != yes && $answer != no ]] || return 0
  answer=no
  ask || return 1
  reason="its first host does not answer"
  [[ $state != ACTIVE ]]
}

clean_up() {
  state=
  if [[ -z $dry_run ]] && ask && [[ $state == NONE ]]; then
    return
  fi
  if [[ -n $keep ]]; then
    echo "$name is kept, and billed: ./launch/tpu_vm.sh delete $(words "$name" "${place[@]}")"
    return
  fi
  delete || {
    ! ask || [[ $state != NONE ]] || return 0
    echo "error: $name: it could not be deleted; the request stays, and its VM may be running and" \
      "billed; $(remedy)" >&2
    return 1
  }
}

# However `train` ends, nothing is left running, or a line says what is.
leave() { # EXIT CODE
  local code=$1
  # A second signal would only end the deletion.
  trap '' INT TERM HUP
  trap - EXIT
  set +e
  if [[ -n $at_stake ]]; then
    # Where the terminal is gone, gcloud must not die of it.
    [[ -n $dry_run ]] || echo "$name: cleaning up" 2>/dev/null || exec >/dev/null
    clean_up || code=$((code ? code : 1))
  fi
  exit "$code"
}

interrupted() { # SIGNAL EXIT CODE
  trap '' INT TERM HUP
  echo "error: $name: interrupted by SIG$1; it is cleaned up, please wait" >&2 || exec 2>/dev/null
  exit "$2"
}

train() {
  local end=$((SECONDS + max_hours * hour)) hours
  result=lost state=NONE
  at_stake=1
  trap '' PIPE
  trap 'leave "$?"' EXIT
  trap 'interrupted INT 130' INT
  trap 'interrupted TERM 143' TERM
  trap 'interrupted HUP 129' HUP
  while [[ $result == lost ]]; do
    hours=$(((end - SECONDS + hour - 1) / hour))
    ((hours > 0)) || fail "$name: --max_hours=$max_hours are over; the run is in $bucket"
    [[ -n $dry_run ]] || patiently ask
    answer=no
    if [[ $state == ACTIVE ]]; then
      patiently ask_training
    else
      [[ $state == NONE ]] || delete || exit 1
      create || fail "$name: it could not be created; see the lines above"
      wait_until_active || {
        delete || exit 1
        [[ -n $spot ]] || fail "$name: no such TPU was given within $valid_for; try another zone"
        echo "$name: it was not given, or taken away again; it is asked for again"
        pause
        continue
      }
    fi
    if [[ $answer == yes ]] || { setup && start "$hours"; }; then
      [[ -z $dry_run ]] || return 0
      watch $((end + hour / 2))
    else
      patiently ask
      [[ $state != ACTIVE ]] || fail "$name: it could not be set up; see the lines above"
    fi
    [[ $result != lost ]] || echo "$name: pre-empted; everything is made again from $bucket"
  done
  on_hosts 0 'tail -n 20 pref_jax/train.log' || true
  [[ $result != late ]] || fail "$name: training did not end within --max_hours=$max_hours"
  echo "the run is in $bucket; exit code of training: $result"
  return "$result"
}

fetch() {
  [[ -n $bucket ]] || fail "--bucket: it is missing; the run is there" 2
  local folder=${workdir:-runs/$name}
  run mkdir -p "$folder"
  run gcloud storage rsync --recursive "$bucket" "$folder"
}

say_state() {
  [[ -n $dry_run ]] || {
    ask || fail "$name: it could not be asked for ($reason); try again"
    echo "$name: $state"
  }
}

case $action in
create) create && say_state ;;
status)
  say_state
  on_hosts 0 'cd pref_jax && tail -n 1 train.log; cat exit_code 2>/dev/null || echo training'
  ;;
logs) on_hosts all 'tail -n 100 pref_jax/train.log' ;;
*) "$action" ;;
esac
