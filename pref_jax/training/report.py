"""The table at the end of training."""

from collections.abc import Mapping
from typing import Any


def print_result(workdir: str, result: Mapping[str, Any]) -> None:
    """Prints log losses beside the baselines, and where the run lies."""
    if "valid" not in result:
        print(f"stopped by {result['stopped']} at update {result['steps']}; saved in {workdir}")
        return
    valid, baselines = result["valid"], result["baselines"]
    low, high = valid["log_loss_ci95"]
    print(f"held-out rows: {valid['rows']}")
    for name, loss in baselines.items():
        print(f"  {name:<22} log loss {loss:.4f}")
    print(
        f"  {'model (step ' + str(result['best_step']) + ')':<22} log loss {valid['log_loss']:.4f} "
        f"({low:.4f} to {high:.4f}), accuracy {valid['accuracy']:.3f}"
    )
    print(f"run: {workdir}")
