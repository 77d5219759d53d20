"""Comparison with an earlier measurement: which settings got slower."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from kfac_sua.bench.compiled import COMPILED
from kfac_sua.bench.record import Arguments, BenchRecord, Cost
from kfac_sua.bench.settings import BASELINE
from kfac_sua.runs.run_info import RecordError

# Ratios can only be compared if these conditions agree.
CONDITIONS = {
    "model": "--model",
    "width": "--width",
    "batch_size": "--batch-size",
    "period": "--period",
    "device": "--device",
    "precision": "--precision",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """The amortised ratio of one setting then and now."""

    setting: str
    old: float
    new: float

    @property
    def relative(self) -> float:
        """Growth over the old ratio; negative where the setting got faster."""
        return self.new / self.old - 1


def refuse_other_conditions(path: Path, old: Arguments, new: Arguments, settings: Collection[str]) -> None:
    """Refuse an earlier measurement whose ratios cannot be compared with this one's.

    Args:
        path: Where it lies, for the message.
        old: What it measured.
        new: What is to be measured.
        settings: Settings that both measure.

    Raises:
        RecordError: If a condition differs, or no setting but plain SGD is in both.
    """
    if old.device == "cuda" and old.steps_together == 1:
        raise RecordError(
            f"{path} was measured on CUDA by an earlier version, with convolutions in TF32 but products in IEEE "
            f"float32, and with a wait for the device after every step; measure it again with --json."
        )
    for name, option in CONDITIONS.items():
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            raise RecordError(
                f"{path} was measured with {name}={before}, this is {name}={now}; give {option} {before} or leave out "
                f"--against."
            )
    if not set(settings) - {BASELINE}:
        raise RecordError(f"{path} and this measurement share no setting but {BASELINE}; give --settings as there.")


def refuse_other_capture(path: Path, old: Iterable[Cost], is_captured: Mapping[str, bool]) -> None:
    """Refuse an earlier measurement that replayed steps where this one launches operations, or the other way round.

    Args:
        path: Where it lies, for the message.
        old: What it measured.
        is_captured: Setting to whether plain steps are replays now.

    Raises:
        RecordError: If it differs for a setting in both, be it plain SGD.
    """
    words = {True: "captured", False: "eager"}
    for cost in old:
        now = is_captured.get(cost.setting, cost.is_captured)
        if now != cost.is_captured:
            raise RecordError(
                f"{path} measured {cost.setting} with {words[cost.is_captured]} plain steps, this has {words[now]} "
                f"ones; give capture={'auto' if cost.is_captured else 'false'} or leave out --against."
            )


def changes(old: BenchRecord, new: BenchRecord) -> list[Change]:
    """Return how the amortised ratio changed, for every setting in both but plain SGD, whose ratio is 1.

    Nor is compiled SGD among them, whose time is not this project's.
    """
    before = {cost.setting: cost.time.amortised_ratio.median for cost in old.costs}
    return [
        Change(cost.setting, before[cost.setting], cost.time.amortised_ratio.median)
        for cost in new.costs
        if cost.setting in before and cost.setting not in (BASELINE, COMPILED)
    ]


def circumstances(old: BenchRecord, new: BenchRecord) -> list[str]:
    """Return what else differs between two measurements and may explain a change."""
    pairs = [
        ("processor", old.environment.device_name, new.environment.device_name),
        ("torch", old.environment.versions.get("torch"), new.environment.versions.get("torch")),
        ("threads", old.arguments.num_threads, new.arguments.num_threads),
        ("overrides", " ".join(old.arguments.overrides), " ".join(new.arguments.overrides)),
    ]
    return [f"{name} {before or 'none'} then, {now or 'none'} now" for name, before, now in pairs if before != now]
