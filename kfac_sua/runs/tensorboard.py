"""TensorBoard view of a run: STEP is the epoch and wall time is training time, so both axes are honest."""

from pathlib import Path

from kfac_sua.runs.record import EpochRecord

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
    "time/evaluation": "evaluation_s",
    "time/writing": "writing_s",
}


class TensorBoardLog:
    """Event file of one run, rewritten from its records whenever it is opened.

    A point's wall time is the run's start plus its training seconds, so TensorBoard's RELATIVE axis leaves out
    evaluation, checkpoints and the pause before a resume; it counts from the first point, which is epoch 0, the
    untrained network at zero seconds. The hyper-parameters are written into the run's own file, which gives one row
    per run in the HPARAMS tab (``add_hparams`` would add a second, time-stamped run).

    Args:
        directory: Directory of the event file, made if missing; older event files in it are removed, as
            TensorBoard merges all files of a directory and would show a resumed epoch twice.
        started_unix_s: Start of the run's first attempt, seconds since 1970.
        hyper_parameters: Flat values for the HPARAMS tab.
        existing: Records of the epochs that are already done.
    """

    def __init__(
        self,
        directory: Path,
        started_unix_s: float,
        hyper_parameters: dict[str, int | float | str | bool],
        existing: list[EpochRecord],
    ) -> None:
        # Imported here because it takes seconds, which collecting and plotting need not pay.
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for stale in directory.glob("events.out.tfevents.*"):
            stale.unlink()
        self._started_unix_s = started_unix_s
        self._writer = SummaryWriter(str(directory))
        file_writer = self._writer._get_file_writer()
        # The metric's value is ignored: the tab shows the last point of the scalar with this tag.
        for summary in hparams(hyper_parameters, {"val/error": 0.0}):
            file_writer.add_summary(summary, walltime=started_unix_s)
        for record in existing:
            self._add(record)
        self._writer.flush()

    def log(self, record: EpochRecord) -> None:
        """Add one epoch and write it out, so that a running TensorBoard shows it.

        Args:
            record: The epoch, not among those already logged.
        """
        self._add(record)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()

    def _add(self, record: EpochRecord) -> None:
        """Add all scalars of one epoch."""
        walltime = self._started_unix_s + record.train_time_s
        for tag, column in SCALARS.items():
            self._writer.add_scalar(tag, getattr(record, column), record.epoch, walltime)
