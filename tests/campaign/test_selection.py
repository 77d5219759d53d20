"""Selection on hand-made grids with known answers."""

import math

import pandas as pd
import pytest

from kfac_sua.campaign.grid import Grid
from kfac_sua.campaign.selection import Choice, Rule, SelectionError, select

CURVE = ("vgg11", "sua")
# One binomial standard error around 10 % on 900 images is exactly 1 %.
VAL_SIZE = 900


def cell(lr, damping, *, train, val, status="finished", test=0.5) -> list[dict]:
    """Return the rows of one run: the untrained network, then an epoch per validation error."""
    shared = {"base_lr": lr, "damping": damping, "fingerprint": f"{lr}/{damping}", "status": status}
    rows = [shared | {"epoch": 0, "train_loss": 2.3, "val_error": 0.01, "test_error": math.nan}]
    for epoch, error in enumerate(val, start=1):
        loss = train if epoch == len(val) else 9.0
        rows.append(shared | {"epoch": epoch, "train_loss": loss, "val_error": error, "test_error": test})
    return rows


def choose(*cells, rule=Rule.one_standard_error, grid=None, first=None) -> Choice:
    """Return the choice among cells."""
    frame = pd.DataFrame([row for rows in cells for row in rows])
    lrs = tuple(sorted(set(frame["base_lr"])))
    dampings = tuple(sorted(set(frame["damping"].dropna()))) or None
    grid = grid or Grid(lrs, dampings)
    return select(frame, CURVE, (first or grid, grid), rule, VAL_SIZE)


def test_training_loss_decides_within_one_standard_error():
    """At 10.9 % against 10.0 % the cell that trains better wins; at 11.1 % it is out."""
    best = cell(0.1, 1.0, train=0.5, val=[0.2, 0.10])
    assert choose(best, cell(0.3, 1.0, train=0.2, val=[0.3, 0.109])).lr == 0.3
    assert choose(best, cell(0.3, 1.0, train=0.2, val=[0.3, 0.111])).lr == 0.1


def test_lowest_validation_error_of_any_epoch_counts():
    """A curve that rises again is judged by its lowest point, its training loss by its end."""
    choice = choose(cell(0.1, 1.0, train=0.1, val=[0.10, 0.5]), cell(0.3, 1.0, train=0.05, val=[0.2, 0.2]))
    assert (choice.lr, choice.val_error, choice.train_loss) == (0.1, 0.10, 0.1)


def test_rules_differ():
    """The same grid has three answers."""
    cells = [
        cell(0.1, 1.0, train=0.5, val=[0.100]),
        cell(0.2, 1.0, train=0.4, val=[0.105]),
        cell(0.3, 1.0, train=0.1, val=[0.300]),
    ]
    assert [choose(*cells, rule=rule).lr for rule in (Rule.val_error, Rule.one_standard_error, Rule.train_loss)] == [
        0.1,
        0.2,
        0.3,
    ]


@pytest.mark.parametrize("rule", list(Rule))
def test_ties_go_to_the_smaller_learning_rate_and_the_larger_damping(rule):
    """Equal cells: the more cautious one, whatever the order of the rows."""
    cells = [cell(lr, damping, train=0.5, val=[0.1]) for lr in (0.3, 0.1) for damping in (0.1, 1.0)]
    for order in (cells, cells[::-1]):
        choice = choose(*order, rule=rule)
        assert (choice.lr, choice.damping) == (0.1, 1.0)


@pytest.mark.parametrize("rule", list(Rule))
def test_diverged_cells_are_counted_and_never_chosen(rule):
    """Even if what they recorded before looks best."""
    diverged = cell(0.3, 1.0, train=0.01, val=[0.01], status="diverged")
    choice = choose(diverged, cell(0.1, 1.0, train=0.5, val=[0.5]), rule=rule)
    assert (choice.lr, choice.num_cells, choice.num_diverged) == (0.1, 2, 1)


def test_all_diverged_is_an_error_with_a_cure():
    """Nothing can be chosen, and the message says what to change."""
    with pytest.raises(SelectionError, match=r"All 1 cells .* vgg11/sua diverged .* smaller learning rates"):
        choose(cell(0.3, 1.0, train=0.01, val=[], status="diverged"))


def test_the_test_set_has_no_say():
    """Turning the test errors around changes nothing."""
    args = [(0.1, 0.5, 0.10), (0.3, 0.2, 0.105)]
    picked = {
        choose(
            *(
                cell(lr, 1.0, train=train, val=[val], test=test)
                for (lr, train, val), test in zip(args, tests, strict=True)
            )
        ).lr
        for tests in ([0.0, 1.0], [1.0, 0.0])
    }
    assert picked == {0.3}


def test_the_untrained_network_is_no_candidate():
    """Row 0 of every run here has a validation error of 1 %, and no one is chosen for it."""
    assert choose(cell(0.1, 1.0, train=0.5, val=[0.4]), cell(0.3, 1.0, train=0.5, val=[0.2])).val_error == 0.2


def test_no_damping_is_none():
    """A baseline's choice has no damping, and its grid no damping range."""
    choice = choose(cell(0.1, math.nan, train=0.5, val=[0.1]), cell(0.2, math.nan, train=0.1, val=[0.5]))
    assert (choice.damping, choice.damping_range, choice.lr_range) == (None, None, (0.1, 0.2))


def test_growth_and_edges_are_reported():
    """Cells beyond the first grid count as grown; the choice on the new edge is named."""
    cells = [cell(lr, 1.0, train=1 - lr, val=[0.1]) for lr in (0.1, 0.3, 0.9)]
    choice = choose(*cells, first=Grid((0.1, 0.3), (1.0,)))
    assert (choice.lr, choice.num_grown, choice.edges) == (0.9, 1, ("lr 0.9 is the highest tried",))
