# shellcheck shell=bash
# Sourced by the set-up commands: finds a Python, makes the virtual environment, installs.
#
#   PREF_JAX_VENV     the virtual environment's folder (default: .venv)
#   PREF_JAX_PYTHON   the interpreter to use (default: the first of 3.11, 3.12, 3.13 that starts)
#   PREF_JAX_NO_UV=1  venv and pip even where there is uv

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${PREF_JAX_VENV:-$repository/.venv}
python=$venv/bin/python

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

have_uv() {
  [[ -z ${PREF_JAX_NO_UV:-} ]] && command -v uv >/dev/null 2>&1
}

# A name on the path proves nothing: pyenv's shims exist for versions that do not start, and some
# systems ship Python without the module that puts pip into a virtual environment.
starts() {
  "$1" -c "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))" \
    >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n ${PREF_JAX_PYTHON:-} ]]; then
    starts "$PREF_JAX_PYTHON" ||
      fail "PREF_JAX_PYTHON: $PREF_JAX_PYTHON is no Python 3.11 to 3.13 with venv; name another" 2
    echo "$PREF_JAX_PYTHON"
    return
  fi
  while read -r candidate; do
    if starts "$candidate"; then
      echo "$candidate"
      return
    fi
  done < <(
    type -ap python3.11 python3.12 python3.13 python3 python
    compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/3.1[123].*/bin/python" || true
  )
}

make_folder() {
  local found
  [[ -x $python ]] && "$python" -c "" >/dev/null 2>&1 && return
  found=$(find_python)
  echo "Making the virtual environment $venv"
  if have_uv; then
    uv venv --quiet --clear --python "${found:-3.11}" "$venv" ||
      fail "$venv: uv could not make it; see the lines above"
  else
    [[ -n $found ]] ||
      fail "python: no Python 3.11 to 3.13 was found; install one or name it in PREF_JAX_PYTHON" 2
    "$found" -m venv --clear "$venv" || fail "$venv: venv could not make it; see the lines above"
  fi
}

# install [EXTRA]: the project, editable, unless nothing that it is installed from has changed.
install() {
  local extra=${1:-} want stamp log
  make_folder
  stamp=$venv/.pref_jax_installed${extra:+_$extra}
  want=$(cd "$repository" && cat setup.cfg pyproject.toml constraints.txt |
    "$python" -c "import hashlib, os, sys; print(sys.version.split()[0], os.getcwd(),
hashlib.sha256(sys.stdin.buffer.read()).hexdigest())")
  if [[ -f $stamp && $(<"$stamp") == "$want" ]]; then
    return
  fi
  echo "Installing packages into $venv (about 4 GB the first time)"
  log=$venv/install.log
  if ! (cd "$repository" && install_packages "${extra:+[$extra]}") >"$log" 2>&1; then
    grep -iE "^ *(error|×|╰)" "$log" | head -n 5 >&2 || true
    if grep -qiE "connection|resolve host|network|timed out|dns|retries" "$log"; then
      fail "$log: the package index cannot be reached; connect to a network and type it again"
    fi
    fail "$log: installing the packages failed; its last lines say why"
  fi
  echo "$want" >"$stamp"
}

install_packages() {
  local links index
  if ! "$python" -m pip --version && have_uv; then
    # uv does not read pip's settings, which may name a place that holds a CPU build of torch.
    links=$(find_setting find-links)
    index=$(find_setting extra-index-url)
    if [[ -n $links$index ]]; then
      export UV_FIND_LINKS=${links//$'\n'/,}
      [[ -z $index ]] || export UV_INDEX=${index//$'\n'/ }
      uv pip install --python "$python" --index-strategy unsafe-best-match \
        -c constraints.txt -e ".$1"
    else
      uv pip install --python "$python" --torch-backend cpu -c constraints.txt -e ".$1"
    fi
    return
  fi
  "$python" -m pip install --disable-pip-version-check --retries 2 -c constraints.txt -e ".$1"
}

find_setting() {
  local any
  any=$(find_python)
  [[ -z $any ]] || "$any" -m pip config get "global.$1" 2>/dev/null || true
}
