"""What a run returns to a sweeper that optimises: one number, the lower the better."""

import math
from collections.abc import Sequence

from kfac_sua.config import Objective
from kfac_sua.runs.record import EpochRecord, RunInfo


def objective_value(objective: Objective, info: RunInfo, records: Sequence[EpochRecord]) -> float:
    """Return what a run is to be judged by; never the test set, which is measured once and chosen by nobody.

    Args:
        objective: Which quantity.
        info: What run.json holds at the end.
        records: The rows of metrics.csv, of which row 0 is the untrained network.

    Returns:
        An error in [0, 1] or a loss in nats; infinity if the run has diverged.
    """
    if info.status != "finished":
        return math.inf
    if objective is Objective.best_val_error:
        return min(record.val_error for record in records[1:])
    last = records[-1]
    values = {
        Objective.final_val_error: last.val_error,
        Objective.final_val_loss: last.val_loss,
        Objective.train_loss: last.train_loss,
        Objective.train_eval_loss: last.train_eval_loss,
    }
    return values[objective]
