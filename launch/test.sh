#!/usr/bin/env bash
# Runs the tests on eight virtual CPU devices, in the virtual environment of quickstart.sh.
#
#   ./launch/test.sh                              everything
#   ./launch/test.sh tests/data -k surrogate      what pytest's arguments pick
#   ./launch/test.sh --install_only               makes the environment and stops
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ ${1:-} == --help ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 0
fi
install test
if [[ ${1:-} == --install_only ]]; then
  exit 0
fi

export PREF_JAX_CACHE=${PREF_JAX_CACHE:-$HOME/.cache/pref_jax}
export XLA_FLAGS="--xla_force_host_platform_device_count=8 ${XLA_FLAGS:-}"
export JAX_PLATFORMS=cpu
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PREF_JAX_CACHE/compiled}
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-3}
cd "$repository"
# Two processes, a whole file to one of them, so that its fixtures are made once; files in their
# order, since the long ones come first. `-n 0` runs everything in one process.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
