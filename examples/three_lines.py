"""Three lines around an ordinary training loop: ``python examples/three_lines.py``."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac_sua import KroneckerPreconditioner  # line 1

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)
test_images, test_labels = images[1500:], labels[1500:]

torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(128, 10)),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
preconditioner = KroneckerPreconditioner(model, structure="sua", damping=0.1, inverse_period=10)  # line 2

for epoch in range(5):
    model.train()
    for batch in torch.randperm(1500).split(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        preconditioner.step()  # line 3: replaces the gradients of Conv2d and Linear layers, in place
        optimizer.step()
    model.eval()
    with torch.no_grad():
        error = (model(test_images).argmax(1) != test_labels).float().mean()
    print(f"epoch {epoch + 1}: loss of the last mini-batch {loss:.4f}, test error {error:.1%}")
