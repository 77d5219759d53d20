"""What the tests of all figures share."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def written(monkeypatch) -> list[Figure]:
    """Collect every figure that is written as PNG, to look at its artists."""
    figures: list[Figure] = []
    save = Figure.savefig

    def record(figure, file, **options):
        if options["format"] == "png":
            figures.append(figure)
        save(figure, file, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Collect every figure that would be written as PNG, without the seconds that writing takes."""
    figures: list[Figure] = []

    def record(figure, file, **options):
        del file
        if options["format"] == "png":
            figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", record)
    return figures
