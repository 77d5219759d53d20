"""The benchmark measures what it says, on a tiny network."""

import json

import pytest

from kfac_sua.bench import main


def test_table_and_json(tmp_path, capsys):
    """Five settings, the baseline first with ratio 1; the amortised ratio is the stated mean."""
    path = tmp_path / "bench.json"
    arguments = ["--model", "tiny", "--rounds", "2", "--refresh-rounds", "1", "--batch-size", "8", "--device", "cpu"]
    main([*arguments, "--json", str(path)])
    costs = json.loads(path.read_text())["costs"]
    assert [cost["name"] for cost in costs] == ["baseline", "kfac", "sua", "grouped", "sua_grouped"]
    assert costs[0]["step_ratio"] == costs[0]["amortised_ratio"] == 1
    for cost in costs[1:]:
        mean = (cost["refresh_s"] + 49 * cost["step_s"]) / 50
        assert cost["amortised_ratio"] == pytest.approx(mean / costs[0]["step_s"])
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--rounds", "0"], "--rounds and"), (["--width", "-1"], "model.width must be"), (["lr=1"], "lr")],
)
def test_bad_options_are_one_sentence(arguments, sentence):
    """A bad option ends before anything is measured."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert sentence in str(stop.value)
    assert "\n" not in str(stop.value)
