"""Mixed precision with a ``GradScaler``, and gradient clipping: ``python examples/amp.py``.

In float16 on a GPU where there is one, else in float16 on the CPU.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac_sua import KroneckerPreconditioner


def main() -> None:
    """Train three epochs and say how many mini-batches overflowed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target, device=device)

    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    preconditioner = KroneckerPreconditioner(model, structure="sua", damping=0.1, inverse_period=10)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24)  # too large on purpose: the first mini-batches overflow

    for epoch in range(3):
        num_skipped = 0
        for batch in torch.randperm(len(images), device=device).split(100):
            optimizer.zero_grad()
            with torch.autocast(device, dtype=torch.float16):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            # Statistics are divided by the scale; a mini-batch with an infinite gradient leaves no trace.
            num_skipped += not preconditioner.step(loss_scale=scaler.get_scale())
            nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)  # of the preconditioned gradient
            scaler.step(optimizer)
            scaler.update()
        print(f"epoch {epoch + 1}: loss of the last mini-batch {loss:.4f}, {num_skipped} mini-batches overflowed")


if __name__ == "__main__":
    main()
