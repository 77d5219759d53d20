"""What other selection rules would have made of the claims, on a grid with a known answer."""

import numpy as np
import pandas as pd
import pytest

from kfac_sua.campaign.judge import rule_table
from kfac_sua.campaign.selection import Rule

EPOCHS = np.arange(5)


def cell(method: str, name: str, loss: float, error: float, status: str = "finished") -> pd.DataFrame:
    """Return a run whose loss and error fall in straight lines from 2 and 0.9 within four epochs."""
    values = {
        "panel": "vgg11",
        "method": method,
        "run": f"{method}/{name}",
        "fingerprint": f"{method}/{name}",
        "base_lr": 0.1,
        "damping": 1.0,
        "precision": "float32",
        "seed": 0,
        "status": status,
        "epoch": EPOCHS,
        "train_loss": 2 - (2 - loss) * EPOCHS / 4,
        "val_error": 0.9 - (0.9 - error) * EPOCHS / 4,
        "train_time_s": 1.0 * EPOCHS,
    }
    return pd.DataFrame(values)


def test_each_rule_has_the_numbers_of_its_own_cells():
    """SUA's best cell in validation needs twice K-FAC's epochs to the baseline's loss, its best in training as many."""
    grid = pd.concat(
        [
            cell("baseline", "only", loss=1.5, error=0.4),
            cell("kfac", "only", loss=0.0, error=0.3),
            cell("sua", "validates", loss=1.0, error=0.2),
            cell("sua", "trains", loss=0.0, error=0.5),
            cell("sua", "diverged", loss=0.0, error=0.0, status="diverged"),
        ]
    )
    table = rule_table(grid, ["C1"], val_size=1000)
    assert list(table.columns) == ["claim", "part", "threshold", *map(str, Rule)]
    assert table["threshold"].tolist() == ["< 1.25"]
    assert table[str(Rule.val_error)].tolist() == pytest.approx([2.0])
    assert table[str(Rule.one_standard_error)].tolist() == pytest.approx([2.0])
    assert table[str(Rule.train_loss)].tolist() == pytest.approx([1.0])


def test_seconds_of_the_grid_are_not_compared():
    """C2 is about seconds alone, which runs that share the device cannot tell."""
    grid = pd.concat([cell(method, "only", 1.0, 0.4) for method in ("baseline", "kfac", "sua")])
    assert rule_table(grid, ["C2"], val_size=1000).empty


def test_without_claims_there_is_nothing_to_tell():
    """An ablation has an empty table."""
    assert rule_table(cell("sua", "only", 1.0, 0.5), [], val_size=1000).empty
