#!/usr/bin/env bash
# On each host of a TPU VM, started by tpu_vm.sh: trains. The exit code stands in exit_code.
#
#   launch/tpu_host.sh [FLAGS OF TRAIN.PY]...
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

echo "$$" >host_pid
.venv/bin/python launch/train.py "$@" &
training=$!
trap 'kill -TERM "$training" 2>/dev/null' TERM
wait "$training"
code=$?
while kill -0 "$training" 2>/dev/null; do # a signal ended the waiting, not the training
  wait "$training"
  code=$?
done
echo "$code" >exit_code
