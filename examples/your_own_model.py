"""A model of one's own: what is preconditioned, layers left out, sampled labels, a checkpoint.

``python examples/your_own_model.py``
"""

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_sua import KroneckerPreconditioner


class Block(nn.Module):
    """A depthwise-separable convolution with a shortcut, added in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``[n, channels, h, w]`` for inputs of the same shape."""
        outputs = self.norm(self.pointwise(self.depthwise(inputs)))
        outputs += inputs
        return outputs.relu_()


class Training:
    """All that a checkpoint holds: network, optimizer and preconditioner."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), Block(24), Block(24), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(96, 10)
        )
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.03, momentum=0.9)
        self.preconditioner = KroneckerPreconditioner(
            self.net,
            structure="kfac",
            group_size=8,
            damping=0.1,
            fisher_type="mc",  # labels drawn from the model, as the Fisher is defined
            inverse_period=10,
            skip=["0"],  # the first convolution keeps the plain gradient; wildcards such as "1.*" work too
        )

    def parts(self) -> dict[str, nn.Module | torch.optim.Optimizer | KroneckerPreconditioner]:
        """Return what has a ``state_dict``."""
        return {"net": self.net, "optimizer": self.optimizer, "preconditioner": self.preconditioner}

    def epoch(self, images: Tensor, labels: Tensor, seed: int) -> float:
        """Train on every image once and return the mean loss of the mini-batches."""
        losses = []
        for batch in torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).split(100):
            self.optimizer.zero_grad()
            logits = self.net(images[batch])
            self.preconditioner.fisher_backward(logits)  # one more backward pass, where statistics are due
            loss = nn.functional.cross_entropy(logits, labels[batch])
            loss.backward()
            self.preconditioner.step()
            self.optimizer.step()
            losses.append(loss.item())
        return sum(losses) / len(losses)


def save(training: Training, path: Path) -> None:
    """Write a checkpoint."""
    torch.save({name: part.state_dict() for name, part in training.parts().items()}, path)


def resume(path: Path) -> Training:
    """Return the training that a checkpoint was made of."""
    training, state = Training(), torch.load(path, weights_only=True)
    for name, part in training.parts().items():
        part.load_state_dict(state[name])
    return training


def main() -> None:
    """Train two epochs, and the second one once more from a checkpoint between them."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)

    training = Training()
    print(training.preconditioner.describe())
    print(f"epoch 1: loss {training.epoch(images, labels, seed=1):.4f}")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "checkpoint.pt"
        save(training, path)
        resumed = resume(path)
    print(f"epoch 2: loss {training.epoch(images, labels, seed=2):.4f}")
    print(f"epoch 2, from the checkpoint: loss {resumed.epoch(images, labels, seed=2):.4f}")
    pairs = zip(training.net.parameters(), resumed.net.parameters(), strict=True)
    print(f"bit for bit the same: {all(torch.equal(one, other) for one, other in pairs)}")
    print(f"numerical faults: {dict(training.preconditioner.events) or 'none'}")


if __name__ == "__main__":
    main()
