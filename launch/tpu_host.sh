#!/usr/bin/env bash
# On each host of a TPU VM, started by tpu_vm.sh: trains, and keeps a copy of the run in a bucket.
#
#   launch/tpu_host.sh FOLDER gs://BUCKET/RUN [FLAGS OF TRAIN.PY]...
#
# The run lies in FOLDER; the first host copies it every minute and once more at the end. Nothing is
# removed from the bucket before all of the new state is there. The exit code stands in exit_code.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

folder=$1
bucket=$2
shift 2
every=${PREF_JAX_COPY_SECONDS:-60}

echo "$$" >host_pid

copy() {
  [[ $(hostname) == *-w-0 || $(hostname) != *-w-* ]] || return 0
  local rsync=(gcloud storage rsync --recursive --exclude='(^|.*/)\.[^/]*$')
  "${rsync[@]}" "$folder" "$bucket" &&
    "${rsync[@]}" --delete-unmatched-destination-objects "$folder" "$bucket"
}

.venv/bin/python launch/train.py --workdir="$folder" "$@" &
training=$!
trap 'kill -TERM "$training" 2>/dev/null' TERM

is_training() {
  kill -0 "$training" 2>/dev/null
}
while is_training; do
  for ((second = 0; second < every; second++)); do
    is_training && sleep 1
  done
  is_training && copy
done
wait "$training"
code=$?
copy || echo "error: $bucket: the run could not be copied there" >&2
echo "$code" >exit_code
