"""Rates of this machine, measured and put in force."""

import pytest
import torch
from tiny_runs import tiny_config

from kfac_sua.bench import device_rates
from kfac_sua.config import ConfigError
from kfac_sua.device import rates_as_configured
from kfac_sua.preconditioner import DeviceRates
from kfac_sua.preconditioner.forms.rates import CPU, CUDA, NEVER, rates_of
from kfac_sua.training.loop import run


def test_rates_are_measured(tmp_path, monkeypatch, capsys):
    """All are numbers that can be, and choices by them leave what was in force as it was."""
    monkeypatch.setattr(device_rates, "CALLS", 1)
    monkeypatch.setattr(device_rates, "GEMM_SHAPES", ((8, 64, 64), (40, 80, 80)))
    monkeypatch.setattr(device_rates, "ROWS", 40)
    monkeypatch.setattr(device_rates, "WIDTH", 64)
    monkeypatch.setattr(device_rates, "BLOCK_WIDTH", 80)
    monkeypatch.setattr(device_rates, "SYMMETRIC_WIDTHS", (8, 16))
    monkeypatch.setattr(device_rates, "LONG_ROWS", 500)
    monkeypatch.setattr(device_rates, "INVERSES", ((3, 20), (1, 90)))
    path = tmp_path / "rates.json"
    assert device_rates.main(["--device", "cpu", "--out", str(path)]) == 0
    rates = DeviceRates.read(path)
    assert rates.source.endswith("measured")
    assert rates.parallel == 1
    assert rates.split_product == 0
    assert 1e6 < rates.memory < 1e13
    assert 1e-8 < rates.launch_s < 1e-2
    assert rates.product_inverse_width in (20, 90, NEVER)
    assert rates_of(torch.device("cpu")) is CPU
    assert f"device_rates={path}" in capsys.readouterr().out


def test_a_run_goes_by_the_rates_of_a_file(tmp_path, capsys):
    """They are in force for its time alone; its directory is its own, as seconds and the last bits are."""
    path = tmp_path / "rates.json"
    CUDA.write(path)
    config = tiny_config(tmp_path, "preconditioner=kfac", f"device_rates={path}", "verbose=true")
    info = run(config)
    assert info.status == "finished"
    assert CUDA.source in capsys.readouterr().out
    assert rates_of(torch.device("cpu")) is CPU
    assert run(tiny_config(tmp_path, "preconditioner=kfac")).fingerprint != info.fingerprint


def test_the_projects_own_rates_have_names():
    """A CPU chooses as a GPU would, without a file."""
    with rates_as_configured("cuda", torch.device("cpu")):
        assert rates_of(torch.device("cpu")) is CUDA
    with rates_as_configured(None, torch.device("cpu")):
        assert rates_of(torch.device("cpu")) is CPU


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_file_without_rates_ends_a_run(tmp_path, content):
    """Before anything is written."""
    path = tmp_path / "rates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"device_rates.*rates\.json"):
        run(tiny_config(tmp_path, f"device_rates={path}"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--device", "toaster", "--out", "x"], 2, "toaster"),
        (["--threads", "0", "--out", "x"], 2, "at least 1"),
        (["--device", "cpu", "--out", "/nonexistent/x"], 1, "Cannot use /nonexistent/x"),
    ],
)
def test_bad_input_is_refused_at_once(options, code, words, capsys, monkeypatch):
    """What cannot be written too: nothing is measured for it."""
    monkeypatch.setattr(device_rates, "measure_device_rates", None)
    try:
        found = device_rates.main(options)
    except SystemExit as stop:  # argparse
        found = stop.code
    assert found == code
    assert words in capsys.readouterr().err
