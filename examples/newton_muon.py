"""Newton-Muon: Muon on gradients preconditioned by the activation factor alone: ``python examples/newton_muon.py``."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from kfac_sua import KroneckerPreconditioner  # line 1

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16  # [1797, 64]
labels = torch.tensor(digits.target)
test_images, test_labels = images[1500:], labels[1500:]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 128, bias=False), nn.ReLU())
model.append(nn.Linear(128, 10))
# Muon is for hidden matrices; the head has an optimizer of its own, and is left to it.
hidden, head = [*model[:4].parameters()], [*model[4].parameters()]
optimizers = [torch.optim.Muon(hidden, lr=0.02, weight_decay=0.0), torch.optim.SGD(head, lr=0.1, momentum=0.9)]
preconditioner = KroneckerPreconditioner(  # line 2
    model, structure="activation_only", damping=0.1, inverse_period=10, skip=["4"]
)

for epoch in range(5):
    for batch in torch.randperm(1500).split(100):
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        preconditioner.step()  # line 3: V becomes V (A + damping I)^-1, which Muon then makes orthogonal
        for optimizer in optimizers:
            optimizer.step()
    with torch.no_grad():
        error = (model(test_images).argmax(1) != test_labels).float().mean()
    print(f"epoch {epoch + 1}: loss of the last mini-batch {loss:.4f}, test error {error:.1%}")
