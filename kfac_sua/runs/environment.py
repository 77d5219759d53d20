"""What a run ran on: versions, commit and device, as run.json and reports name them."""

import dataclasses
import hashlib
import importlib.metadata
import platform
import socket
import subprocess
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Environment:
    """What a run ran on: fields of ``RunInfo`` that do not follow from the configuration."""

    versions: dict[str, str | None]
    commit: str | None
    device_name: str

    @property
    def machine(self) -> str:
        """The host and its device, which decide what seconds mean."""
        return f"{socket.gethostname()} ({self.device_name})"


def environment(device: str = "auto") -> Environment:
    """Return versions, commit and device name for run.json.

    Args:
        device: ``cpu``, ``cuda`` (optionally with an index), or ``auto``: CUDA where there is a device.

    Returns:
        Versions of Python and of the packages that numbers depend on (None if not installed), the commit with
        ``+dirty`` if the checkout has changes (None outside a checkout), and the name of the device.
    """
    import torch  # imported here, as reading and writing records does not need it

    # Of torch itself, as only torch.__version__ names its CUDA build; of the others, from package metadata.
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("torchvision", "numpy", "hydra-core", "kfac_sua"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return Environment(versions, source_commit(), _device_name(device))


def source_commit() -> str | None:
    """Return the commit of the source, with ``+dirty`` if it has changes; None outside a checkout."""
    return _commit(Path(__file__).resolve().parents[2])


def source_digest() -> str:
    """Return the SHA-256 of the package's source, which also tells copies without a commit apart."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _commit(root: Path) -> str | None:
    """Return the commit of the checkout at root; None if root lies in another repository, as site-packages may."""
    toplevel, head = _git(root, "rev-parse", "--show-toplevel"), _git(root, "rev-parse", "HEAD")
    if not toplevel or not head or Path(toplevel).resolve() != root:
        return None
    return head if _git(root, "status", "--porcelain") == "" else f"{head}+dirty"


def _git(root: Path, *arguments: str) -> str | None:
    """Return what git prints, or None if there is no git, no repository or no commit."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _device_name(device: str) -> str:
    """Return the name of the GPU or the processor; the latter from /proc/cpuinfo if there is one."""
    import torch

    if device.startswith("cuda") or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.get_device_name(None if device in ("auto", "cuda") else device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
