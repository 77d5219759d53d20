"""Plain steps as one CUDA graph, in three lines of an ordinary loop: ``python examples/captured.py``.

On a GPU where there is one. On the CPU the captured step calls the function, so the loop is the same.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_sua import CapturedStep, KroneckerPreconditioner  # line 1


def main() -> None:
    """Train three epochs and say how many steps were replays."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, fused=True)
    preconditioner = KroneckerPreconditioner(model, structure="sua", damping=0.1, inverse_period=10)
    total = torch.zeros((), device=device)

    def train_step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        preconditioner.step()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)  # whatever belongs to a step is inside
        optimizer.step()
        total.add_(loss.detach())  # a replay runs no Python: sums are tensors that are added to in place

    step = CapturedStep(train_step, model, optimizer, preconditioner)  # line 2

    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.03 * 0.5**epoch  # schedules stay outside
        total.zero_()
        batches = torch.randperm(len(images), device=device).split(100)
        for batch in batches:
            step(images[batch], labels[batch])  # line 3; the last mini-batch of 97 is taken eagerly
        print(f"epoch {epoch + 1}: mean loss {total / len(batches):.4f}")
    print(f"{step.num_replays} of {3 * len(batches)} steps were replays" + (step.why_eager and f": {step.why_eager}"))


if __name__ == "__main__":
    main()
