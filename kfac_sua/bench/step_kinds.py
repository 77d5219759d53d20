"""The kinds of steps in a refresh period, and how the next step is made one of a kind."""

from enum import StrEnum

from kfac_sua.preconditioner import KroneckerPreconditioner


class StepKind(StrEnum):
    """What a step does besides applying the inverses at hand."""

    plain = "plain"
    statistics = "statistics"
    """Also measures statistics."""
    refresh = "refresh"
    """Also measures statistics and inverts."""


def steps_per_period(preconditioner: KroneckerPreconditioner) -> dict[StepKind, int]:
    """Return how many steps of each kind a refresh period has; kinds that do not occur are left out."""
    period, factor_period = preconditioner.settings.inverse_period, preconditioner.factor_period
    measuring = period // factor_period
    counts = {StepKind.plain: period - measuring, StepKind.statistics: measuring - 1, StepKind.refresh: 1}
    return {kind: count for kind, count in counts.items() if count}


def make_due(preconditioner: KroneckerPreconditioner, kind: StepKind) -> None:
    """Make the next step one of this kind, which must be one of ``steps_per_period``."""
    is_due = {
        StepKind.plain: not preconditioner.statistics_due,
        StepKind.statistics: preconditioner.statistics_due and not preconditioner.inverses_due,
        StepKind.refresh: preconditioner.inverses_due,
    }
    if not is_due[kind]:
        position = {StepKind.plain: 1, StepKind.statistics: preconditioner.factor_period, StepKind.refresh: 0}
        preconditioner.go_to_step(position[kind])
