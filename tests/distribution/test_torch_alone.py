"""The library needs PyTorch alone: constructed, trained and saved with every other package out of reach."""

import subprocess
import sys
import textwrap

WITHOUT_OTHERS = textwrap.dedent(
    """
    import importlib.metadata, re, sys

    def needed(name, found):  # PyTorch's distribution, and what it requires
        key = re.sub("[-_.]+", "-", name).lower()
        if key not in found:
            try:
                requirements = importlib.metadata.requires(key) or []
            except importlib.metadata.PackageNotFoundError:
                return found  # of another platform
            found.add(key)
            for requirement in requirements:
                if "extra ==" not in requirement:
                    needed(re.match("[A-Za-z0-9._-]+", requirement)[0], found)
        return found

    allowed = needed("torch", set())
    owners = importlib.metadata.packages_distributions()
    hidden = {
        module for module, distributions in owners.items()
        if not any(re.sub("[-_.]+", "-", one).lower() in allowed for one in distributions)
    } - {"kfac_sua", "torch"}

    class WithoutHidden:  # a finder that finds what another one does, but for the hidden packages
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)

    sys.meta_path[:] = map(WithoutHidden, sys.meta_path)
    assert {"hydra", "omegaconf", "torchvision", "numpy", "pandas", "tensorboard"} <= hidden
    """
)

TRAINS = textwrap.dedent(
    """
    import torch
    from torch import nn
    from kfac_sua import AdaptiveDamping, CapturedStep, KroneckerPreconditioner

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    for structure in ("kfac", "sua"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        preconditioner = KroneckerPreconditioner(net, structure=structure, group_size=2, damping=1.0, inverse_period=2)

        def train_step(images, labels):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            preconditioner.step()
            optimizer.step()
            return loss.detach()

        step = CapturedStep(train_step, net, optimizer, preconditioner)
        losses = [float(step(images, labels)) for _ in range(4)]
        assert losses[-1] < losses[0], losses
        torch.save(preconditioner.state_dict(), sys.argv[1])
        twin = KroneckerPreconditioner(net, structure=structure, group_size=2, damping=1.0, inverse_period=2)
        twin.load_state_dict(torch.load(sys.argv[1], weights_only=True))
        assert twin.num_steps == 4
        print(preconditioner.describe())
    """
)

COMMAND = "import runpy; runpy.run_module('kfac_sua.train', run_name='__main__')"


def run(code, *arguments):
    """Run code in a process that cannot import other packages than PyTorch's."""
    command = [sys.executable, "-c", WITHOUT_OTHERS + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_library_trains_and_saves_with_torch_alone(tmp_path):
    """Also what a captured step and the table of layers need."""
    result = run(TRAINS, str(tmp_path / "state.pt"))
    assert result.returncode == 0, result.stderr
    assert "layer" in result.stdout


def test_a_command_says_in_one_sentence_what_is_missing():
    """Where the library was installed beside PyTorch alone."""
    result = run(COMMAND)
    assert result.returncode == 2
    assert result.stderr == (
        "This command needs the package 'hydra', which is not installed: python -m pip install kfac_sua installs it "
        "and all others that the commands need (pip's --no-deps leaves them out, as the library needs PyTorch alone).\n"
    )
