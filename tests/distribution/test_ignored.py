"""What git does not see: an untracked file would mark the commit of every run as changed."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_directories_that_are_links_are_ignored_too(tmp_path):
    """Data, environments and outputs often lie on another disk, with a link in the checkout."""
    elsewhere, checkout = tmp_path / "elsewhere", tmp_path / "checkout"
    (elsewhere / "runs").mkdir(parents=True)
    (checkout / "outputs").mkdir(parents=True)
    for link in ("data", ".venv", "site", "dist", "build", ".mypy_cache", "outputs/runs"):
        (checkout / link).symlink_to(elsewhere)
    shutil.copy(ROOT / ".gitignore", checkout)
    subprocess.run(["git", "init", "--quiet", str(checkout)], check=True)
    status = ["git", "-C", str(checkout), "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(status, check=True, capture_output=True, text=True).stdout == "?? .gitignore\n"
