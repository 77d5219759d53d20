"""Inside Lightning's loop, as a callback: ``python examples/lightning_loop.py`` (needs ``lightning``)."""

from pathlib import Path
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_sua import KroneckerPreconditioner


class Preconditioning(lightning.Callback):
    """Preconditions the gradients of a module's ``net`` before every step of the optimizer.

    Lightning calls ``on_before_optimizer_step`` once per optimizer step, after all micro-batches of an accumulated one,
    with gradients that are unscaled and not yet clipped: gradient clipping sees the preconditioned gradient.

    Args:
        **settings: Of the :class:`KroneckerPreconditioner`.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.preconditioner: KroneckerPreconditioner | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make the preconditioner; by now there is a process group, if there is to be one."""
        if stage == "fit":
            self.preconditioner = KroneckerPreconditioner(pl_module.get_submodule("net"), **self.settings)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Replace the gradients."""
        assert self.preconditioner is not None
        scaler = getattr(trainer.precision_plugin, "scaler", None)  # of precision="16-mixed"
        self.preconditioner.step(loss_scale=scaler.get_scale() if scaler else None)

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoints keep."""
        return self.preconditioner.state_dict() if self.preconditioner else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint, which Lightning reads after ``setup``."""
        if self.preconditioner and state_dict:
            self.preconditioner.load_state_dict(state_dict)


class Classifier(lightning.LightningModule):
    """A small convolutional network; nothing in it knows of the preconditioner."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 10)),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a mini-batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return SGD with momentum."""
        return torch.optim.SGD(self.net.parameters(), lr=0.03, momentum=0.9)


def train(
    module: Classifier, loader: DataLoader[tuple[Tensor, ...]], ckpt_path: Path | None = None, **options: Any
) -> lightning.Trainer:
    """Train a module with the preconditioner, from a checkpoint if there is one; options are the trainer's."""
    callback = Preconditioning(structure="sua", damping=0.1, inverse_period=10)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(**{"callbacks": [callback], "enable_model_summary": False, **quiet, **options})
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def main() -> None:
    """Train two epochs on the digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), batch_size=100, shuffle=True)
    lightning.seed_everything(0, verbose=False)
    trainer = train(Classifier(), loader, max_epochs=2)
    print(f"loss of the last mini-batch {trainer.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
