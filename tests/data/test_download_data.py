"""The download command: what it prints and how it ends."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kfac_sua.data.download import main

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_data.py"
COMMANDS = [[str(SCRIPT)], ["-m", "kfac_sua.data.download"]]


def test_complete_archive_is_checked_and_not_fetched(
    tmp_path: Path,
    tiny_arrays: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Running it again must say what is there, without importing torchvision's downloader."""
    np.savez(tmp_path / "cifar10.npz", **tiny_arrays)
    main(["cifar10", "--data-dir", str(tmp_path)])
    assert capsys.readouterr().out == (f"{tmp_path / 'cifar10.npz'}: 40 training and 20 test images, 10 classes\n")


def test_without_network_it_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing network is not worth a traceback; sys.exit with a text is exit code 1."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(SystemExit) as caught:
        main(["--data-dir", str(tmp_path)])
    assert str(caught.value.code) == (
        f"Error: cifar10 could not be downloaded into {tmp_path} (URLError: <urlopen error no network>); "
        "try again where there is a network, give dataset.data_dir=DIR with a DIR that holds cifar10.npz, "
        "cifar-10-python.tar.gz or its folder cifar-10-batches-py, or use dataset=digits."
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=["script", "module"])
def test_damaged_archive_gives_exit_code_one_and_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    """As a process, in a checkout and without one, it must print the sentence to stderr, nothing else, and fail."""
    (tmp_path / "cifar10.npz").write_text("not an archive")
    command = [sys.executable, *arguments, "cifar10", "--data-dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: {tmp_path / 'cifar10.npz'} is not a readable .npz archive")
    assert result.stderr.count("\n") == 1
