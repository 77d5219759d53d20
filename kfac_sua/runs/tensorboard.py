"""TensorBoard logs of a run: wall time is training time, and STEP is the epoch or, for single steps, their number."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_sua.files.openers import refuse_link
from kfac_sua.runs.event_file import EventFile
from kfac_sua.runs.hyper_parameters import Value, hyper_parameter_summaries
from kfac_sua.runs.metrics import MAY_BE_UNMEASURED, EpochRecord

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

# Tag in TensorBoard -> column of metrics.csv.
SCALARS = {
    "train/loss": "train_loss",
    "train/error": "train_error",
    "train/lr": "lr",
    "train/eval_loss": "train_eval_loss",
    "val/loss": "val_loss",
    "val/error": "val_error",
    "time/train": "train_time_s",
    "time/forward_backward": "forward_backward_s",
    "time/statistics": "statistics_s",
    "time/inversion": "inversion_s",
    "time/application": "application_s",
    "time/optimizer": "optimizer_s",
    "time/data": "data_s",
    "time/other": "other_s",
    "time/captured": "captured_s",
    "time/evaluation": "evaluation_s",
    "time/writing": "writing_s",
    "update/damping": "current_damping",
    "update/gradient_norm": "gradient_norm",
    "update/norm": "update_norm",
    "update/cosine": "update_cosine",
    "update/kl_scale": "kl_scale",
    "update/numerical_faults": "numerical_faults",
    "update/other_events": "other_events",
    "update/skipped_steps": "skipped_steps",
}


STEPS = "steps"
"""Directory of the losses of single steps, below the run's: a separate run for TensorBoard.

A restart has one step for all points of a run, and points per epoch and points per step cannot share it.
"""

STEP_LOSS = "train/step_loss"


class TensorBoardLog:
    """The epochs of one run, in one event file per attempt (see ``event_file.py``).

    Every file begins with all epochs that are complete and replaces the files before it. So it does not matter what is
    left of those, and epochs that were dropped by a resume from an earlier checkpoint disappear.

    A point's wall time is the run's start plus its training seconds. So TensorBoard's RELATIVE axis leaves out
    evaluation, checkpoints and the pause before a resume. It counts from the first point: epoch 0, the untrained
    network, at zero seconds. The hyper-parameters are in the same file, which gives one row per run in the HPARAMS tab
    (``add_hparams`` would add a second, time-stamped run).

    Args:
        directory: Directory of the event file, made if missing.
        started_unix_s: Start of the run's first attempt, seconds since 1970.
        hyper_parameters: What :func:`hyper_parameters` returned for the run's configuration.
        existing: Records of the complete epochs.

    Raises:
        OSError: If the file cannot be written; it names the file.
    """

    def __init__(
        self,
        directory: Path,
        started_unix_s: float,
        hyper_parameters: Mapping[str, Value],
        existing: list[EpochRecord],
    ) -> None:
        # Imported here because it takes seconds, and collecting and plotting do not need it.
        from tensorboard.compat.proto.event_pb2 import Event

        self._started_unix_s = started_unix_s
        summaries = hyper_parameter_summaries(hyper_parameters, started_unix_s)
        events = [Event(wall_time=started_unix_s, summary=summary) for summary in summaries]
        self._file = EventFile(directory, started_unix_s, 0, [*events, *map(self._event, existing)])

    def log(self, record: EpochRecord) -> None:
        """Add one epoch and write it out, so that a running TensorBoard shows it.

        Args:
            record: The epoch, not among those already logged.

        Raises:
            OSError: If the file cannot be written; it names the file.
        """
        self._file.append([self._event(record)])

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _event(self, record: EpochRecord) -> "Event":
        """Return all scalars of one epoch as one event; a reader takes it as a whole, or skips it if it is torn."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        columns = {tag: (column, getattr(record, column)) for tag, column in SCALARS.items()}
        values = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, (column, value) in columns.items()
            if not (column in MAY_BE_UNMEASURED and math.isnan(value))
        ]
        walltime = self._started_unix_s + record.train_time_s
        return Event(wall_time=walltime, step=record.epoch, summary=Summary(value=values))


class StepLog:
    """The losses of single mini-batches, in one event file per attempt.

    A file continues the files before it: these have all steps up to the checkpoint that the run resumes from, because
    losses are written before a checkpoint. The loss at step n, counted from 1, is the one before that step is taken.

    Args:
        directory: Directory of the run.
        started_unix_s: Start of the run's first attempt, seconds since 1970.
        step: Completed steps; points of later steps in earlier files are dropped.
        train_time_s: Seconds of training so far.

    Raises:
        OSError: If the file cannot be written, or its directory is a link; it names the file or the link.
    """

    def __init__(self, directory: Path, started_unix_s: float, step: int, train_time_s: float) -> None:
        self._started_unix_s = started_unix_s
        self._step, self._train_time_s = step, train_time_s
        refuse_link(directory / STEPS)
        self._file = EventFile(directory / STEPS, started_unix_s, step + 1)

    def log(self, losses: Sequence[tuple[int, float]], step: int, train_time_s: float) -> None:
        """Add losses and write them out.

        The time between two calls is divided evenly among its steps, as a GPU does not report when each one ended.

        Args:
            losses: Pairs of a step's number and its loss in nats.
            step: Steps taken so far.
            train_time_s: Seconds of training so far.

        Raises:
            OSError: If the file cannot be written; it names the file.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        per_step = (train_time_s - self._train_time_s) / max(step - self._step, 1)
        self._file.append(
            Event(
                wall_time=self._started_unix_s + train_time_s - (step - number) * per_step,
                step=number,
                summary=Summary(value=[Summary.Value(tag=STEP_LOSS, simple_value=loss)]),
            )
            for number, loss in losses
        )
        self._step, self._train_time_s = step, train_time_s

    def close(self) -> None:
        """Close the event file."""
        self._file.close()
