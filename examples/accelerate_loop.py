"""Inside a loop of Accelerate: ``python examples/accelerate_loop.py`` (needs ``accelerate``)."""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_sua import KroneckerPreconditioner


def make_model() -> nn.Module:
    """Return a small convolutional network."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def train(
    model: nn.Module, loader: DataLoader[tuple[Tensor, ...]], accelerator: Accelerator, *, num_epochs: int
) -> float:
    """Train a model, of whatever precision and accumulation the accelerator is, and return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    preconditioner = KroneckerPreconditioner(model, structure="sua", damping=0.1, inverse_period=10)
    for _ in range(num_epochs):
        for images, labels in loader:
            with accelerator.accumulate(prepared):
                loss = nn.functional.cross_entropy(prepared(images), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:  # the gradients of all micro-batches are there
                    accelerator.unscale_gradients()
                    scaler = accelerator.scaler  # of mixed_precision="fp16"
                    preconditioner.step(loss_scale=scaler.get_scale() if scaler else None)
                optimizer.step()
                optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Train two epochs on the digits, four micro-batches of 25 per step."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    data = TensorDataset(images, torch.tensor(digits.target))
    torch.manual_seed(0)
    loader = DataLoader(data, batch_size=25, shuffle=True, drop_last=True)
    loss = train(make_model(), loader, Accelerator(gradient_accumulation_steps=4), num_epochs=2)
    print(f"loss of the last micro-batch {loss:.4f}")


if __name__ == "__main__":
    main()
