"""The progress of a run on the screen: a bar in a terminal, one line per epoch elsewhere."""

import functools
import sys

from tqdm import tqdm

from kfac_sua.config import ProgressStyle
from kfac_sua.runs.metrics import EpochRecord


class Progress:
    """Shows steps and epochs.

    Args:
        style: ``auto`` is a bar if stderr is a terminal, and lines otherwise.
        label: Beginning of the bar.
        total_steps: Steps of the whole run.
        done_steps: Steps of earlier attempts.
        epochs: Epochs of the whole run.
    """

    def __init__(self, style: ProgressStyle, label: str, *, total_steps: int, done_steps: int, epochs: int) -> None:
        is_bar = style is ProgressStyle.bar or (style is ProgressStyle.auto and sys.stderr.isatty())
        self._prints_lines = style is ProgressStyle.lines or (style is ProgressStyle.auto and not is_bar)
        self._epochs = epochs
        self._bar = tqdm(
            total=total_steps,
            initial=done_steps,
            desc=label,
            unit="step",
            dynamic_ncols=True,
            disable=not is_bar,
        )

    def step(self) -> None:
        """Count one optimisation step."""
        self._bar.update()

    def epoch(self, record: EpochRecord) -> None:
        """Show the result of one epoch."""
        if self._prints_lines:
            print(epoch_line(record, self._epochs), flush=True)
        self._bar.set_postfix_str(
            f"epoch {record.epoch}/{self._epochs}, train loss {record.train_eval_loss:.3g}, "
            f"val error {record.val_error:.1%}"
        )

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


@functools.cache
def print_once(text: str) -> None:
    """Print a text unless this process has printed it before, as the runs of a sweep print mostly the same.

    Args:
        text: What to print.
    """
    print(text, flush=True)


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """Return the result of an epoch in one line.

    Args:
        record: The epoch.
        epochs: Epochs of the whole run.
    """
    return (
        f"epoch {record.epoch:>{len(str(epochs))}}/{epochs}  train loss {record.train_loss:.4f} error "
        f"{record.train_error:6.2%}  eval loss {record.train_eval_loss:.4f}  val loss {record.val_loss:.4f} error "
        f"{record.val_error:6.2%}  {record.train_time_s:.1f} s"
    )
