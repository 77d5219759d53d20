"""A server of this machine that plays the authors' one, well or badly, with an archive of a few hundred images."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER, DOWNLOAD = "cifar-10-batches-py", "cifar-10-python.tar.gz"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
IMAGES_PER_FILE = 60
DRIVER = Path(__file__).with_name("fetch_driver.py")


@dataclass(frozen=True)
class FakeCifar:
    """CIFAR-10 as its authors pack it, but small.

    Attributes:
        files: Content of the folder's files, by name, in the order of the archive.
        archive: The ``.tar.gz``.
    """

    files: dict[str, bytes]
    archive: bytes

    def attributes(self, url: str) -> dict[str, Any]:
        """Return what torchvision's class must say, so that it takes these files for the data set."""
        listed = [[name, hashlib.md5(content).hexdigest()] for name, content in self.files.items()]
        return {
            "url": url,
            "tgz_md5": hashlib.md5(self.archive).hexdigest(),
            "train_list": [one for one in listed if one[0].startswith("data_batch")],
            "test_list": [one for one in listed if one[0] == "test_batch"],
            "meta": {"filename": "batches.meta", "key": "label_names", "md5": dict(listed)["batches.meta"]},
        }

    def extract(self, root: Path, *, without: str | None = None) -> None:
        """Write the folder as an extraction leaves it that was cut before one of the files."""
        (root / FOLDER).mkdir(parents=True)
        for name, content in self.files.items():
            if name != without:
                (root / FOLDER / name).write_bytes(content)


def fake_cifar() -> FakeCifar:
    """Return five files of training images, one of test images, and the one with the names."""
    generator = np.random.default_rng(0)
    files = {
        name: pickle.dumps(
            {
                "data": generator.integers(0, 256, (IMAGES_PER_FILE, 3072), dtype=np.uint8),
                "labels": [index % 10 for index in range(IMAGES_PER_FILE)],
            }
        )
        for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
    }
    files["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return FakeCifar(files, packed.getvalue())


@dataclass
class Mirror:
    """The server.

    Attributes:
        cifar: What it serves.
        url: Where.
        behaviour: ``whole``, ``broken``, ``truncated``, ``slow``, ``held`` (a trickle until it may go on), ``stalled``,
            ``page`` (of another server) or ``missing``.
        pause_s: Between the parts of what is sent slowly.
        downloads: Requests for the archive so far.
        is_sending: Set when the first part of a download is out.
        may_go_on: What a held download waits for, and a stalled one at the end.
    """

    cifar: FakeCifar
    url: str = ""
    behaviour: str = "whole"
    pause_s: float = 0.1
    downloads: int = 0
    is_sending: threading.Event = field(default_factory=threading.Event)
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        content = self.cifar.archive
        request.send_response(404 if self.behaviour == "missing" else 200)
        if request.headers.get("Method") == "HEAD":  # torchvision's way to ask for redirections
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        self.downloads += 1
        if self.behaviour == "broken":
            content = content[:1000] + bytes([content[1000] ^ 0xFF]) + content[1001:]
        elif self.behaviour in ("page", "missing"):
            content = b"<html>Please log in.</html>"
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        for part in self._parts(content):
            request.wfile.write(part)
            self.is_sending.set()

    def _parts(self, content: bytes) -> Iterator[bytes]:
        """Yield what is sent, with the pauses that belong to the behaviour."""
        half = len(content) // 2
        if self.behaviour == "slow":
            size = len(content) // 10
            for first in range(0, len(content), size):
                yield content[first : first + size]
                time.sleep(self.pause_s)
        elif self.behaviour == "held":
            for first in range(half):
                yield content[first : first + 1]
                if self.may_go_on.wait(self.pause_s):
                    yield content[first + 1 :]
                    return
        elif self.behaviour in ("truncated", "stalled"):
            yield content[:half]
            if self.behaviour == "stalled":
                self.may_go_on.wait()
        else:
            yield content


@contextlib.contextmanager
def serving(cifar: FakeCifar) -> Iterator[Mirror]:
    """Serve an archive at a free port of this machine."""
    mirror = Mirror(cifar)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with contextlib.suppress(ConnectionError):
                mirror.answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    mirror.url = f"http://127.0.0.1:{server.server_port}/{DOWNLOAD}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield mirror
    finally:
        mirror.may_go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


def use_mirror(monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    """Make torchvision in this process take a mirror for the authors' server, whatever proxies are set."""
    from torchvision.datasets import CIFAR10

    for name, value in mirror.cifar.attributes(mirror.url).items():
        monkeypatch.setattr(CIFAR10, name, value)
    for name in _proxies():
        monkeypatch.delenv(name)


def start(
    mirror: Mirror, folder: Path, module: str, *arguments: str, patience_s: float | None = None, processes: int = 1
) -> subprocess.Popen[str]:
    """Start ``python -m kfac_sua.<module>`` in a folder, by so many processes, with a mirror for the server."""
    settings = {"attributes": mirror.cifar.attributes(mirror.url), "patience_s": patience_s}
    path = folder / "mirror.json"
    path.write_text(json.dumps(settings))
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
    environment = {name: value for name, value in os.environ.items() if name not in _proxies()}
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else ()), str(DRIVER), str(path), module, *arguments],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _proxies() -> list[str]:
    return [name for name in os.environ if name.lower().endswith("_proxy")]
