"""What a campaign consists of: ``configs/campaign/*.yaml`` as dataclasses.

A campaign is a figure of the paper, or an ablation. It has panels, each with one curve per method, and each curve has
the grid that tunes it. A scale says how large all this is (``configs/campaign/scale``).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kfac_sua.compose.explain import explain
from kfac_sua.config import CONFIG_DIR, ConfigError

_CAMPAIGNS = CONFIG_DIR / "campaign"

GROUP_SIZE = "{group_size}"
"""What stands in a label for the channels per group."""


@dataclasses.dataclass(kw_only=True)
class Curve:
    """One curve of one panel.

    Attributes:
        method: Name of the curve in records and figures, unique within its panel.
        overrides: Arguments of ``python -m kfac_sua.train`` for its runs; usually ``experiment=<name>``.
        tuning: Which of the scale's grids tunes it, such as ``lr`` or ``lr_damping``.
        label: Name in legends and tables; None takes the one in ``figures/style.py``. ``{group_size}`` in it stands for
            the channels per group of the curve's runs, which the scale changes (``publish.py``).
        optional: Whether it is trained only if asked for by name, as a comparator that the paper does not have.
    """

    method: str = MISSING
    overrides: list[str] = MISSING
    tuning: str = MISSING
    label: str | None = None
    optional: bool = False


@dataclasses.dataclass(kw_only=True)
class Panel:
    """Curves that are compared with each other: one network, one data set, one schedule.

    Attributes:
        name: Name of the panel in records, unique within the campaign.
        curves: Its curves.
        title: Heading in figures and report. ``publish.py`` makes it from the records of the runs.
    """

    name: str = MISSING
    curves: list[Curve] = MISSING
    title: str = ""


@dataclasses.dataclass(kw_only=True)
class Scale:
    """How large a campaign is.

    Attributes:
        run: Overrides of every run, after those of its curve.
        grid: Overrides of the runs of the grid, after ``run``: usually a shorter training.
        sweeps: From a curve's ``tuning`` to the file of ``configs/sweep`` that holds its grid.
        growth_steps: How often a grid grows by one step beyond an edge on which the best cell lies.
    """

    run: list[str] = MISSING
    grid: list[str] = MISSING
    sweeps: dict[str, str] = MISSING
    growth_steps: int = MISSING


@dataclasses.dataclass(kw_only=True)
class Campaign:
    """One figure of the paper with everything behind it, or an ablation.

    Attributes:
        name: File in ``configs/campaign``.
        title: Heading of its figure and report, to which ``publish.py`` adds network and data set of the runs.
        figure: Which drawing: ``fig1`` (loss per epoch, error per second) or ``fig2`` (both errors per second).
        claims: Claims of the paper (``claims.py``) that it decides.
        differences: Sentences for the report on what differs from the paper.
        panels: Its panels.
        scales: By scale, keys that replace those of ``configs/campaign/scale``.
    """

    name: str = MISSING
    title: str = MISSING
    figure: str = MISSING
    claims: list[str] = dataclasses.field(default_factory=list)
    differences: list[str] = dataclasses.field(default_factory=list)
    panels: list[Panel] = MISSING
    scales: dict[str, Any] = dataclasses.field(default_factory=dict)

    def labels(self) -> dict[str, str]:
        """Return the labels that the campaign gives to methods."""
        return {curve.method: curve.label for panel in self.panels for curve in panel.curves if curve.label}

    def methods(self) -> list[str]:
        """Return the methods in their order, each once."""
        return list(dict.fromkeys(curve.method for panel in self.panels for curve in panel.curves))


def campaign_names() -> list[str]:
    """Return the campaigns there are."""
    return sorted(path.stem for path in _CAMPAIGNS.glob("*.yaml"))


def scale_names() -> list[str]:
    """Return the scales there are."""
    return sorted(path.stem for path in (_CAMPAIGNS / "scale").glob("*.yaml"))


def load_campaign(name: str) -> Campaign:
    """Return a campaign.

    Args:
        name: File in ``configs/campaign``, without its ending; or the path of a file of one's own, which ends with
            ``.yaml``.

    Raises:
        ConfigError: If there is none of that name, or the file does not hold what a campaign needs.
    """
    path = Path(name)
    if path.suffix == ".yaml":
        source = name
        if not path.is_file():
            raise ConfigError(
                f"There is no campaign file {name}; give a file, or one of {', '.join(campaign_names())}."
            )
    else:
        _check_name("campaign", name, campaign_names())
        path, source = _CAMPAIGNS / f"{name}.yaml", f"configs/campaign/{name}.yaml"
    campaign = _read(Campaign, _load(path, source), source)
    assert isinstance(campaign, Campaign)
    if campaign.name != path.stem:
        raise ConfigError(f"{source} calls itself '{campaign.name}'; give it the name of its file.")
    if campaign.figure not in ("fig1", "fig2"):
        raise ConfigError(f"{source}: figure must be fig1 or fig2, got '{campaign.figure}'.")
    for panel in campaign.panels:
        methods = [curve.method for curve in panel.curves]
        twice = {method for method in methods if methods.count(method) > 1}
        if twice:
            raise ConfigError(f"{source} has {min(twice)} twice in panel {panel.name}; rename one.")
    return campaign


def load_scale(campaign: Campaign, name: str) -> Scale:
    """Return a scale as a campaign uses it.

    Args:
        campaign: The campaign. Keys of its own ``scales`` replace those of the file.
        name: File in ``configs/campaign/scale``, without its ending.

    Raises:
        ConfigError: If there is none of that name, or the file does not hold what a scale needs.
    """
    _check_name("scale", name, scale_names())
    general = OmegaConf.load(_CAMPAIGNS / "scale" / f"{name}.yaml")
    merged = OmegaConf.merge(general, campaign.scales.get(name, {}))
    scale = _read(Scale, merged, f"configs/campaign/scale/{name}.yaml with {campaign.name}.yaml")
    assert isinstance(scale, Scale)
    return scale


def keep_methods(campaign: Campaign, methods: Sequence[str], extra: Sequence[str]) -> Campaign:
    """Return a campaign with only some of its curves.

    Args:
        campaign: The campaign as defined.
        methods: The only methods to keep; empty for all that are not optional.
        extra: Optional methods to add.

    Raises:
        ConfigError: If a method does not exist, or one of ``extra`` is not optional.
    """
    known = campaign.methods()
    optional = list(
        dict.fromkeys(curve.method for panel in campaign.panels for curve in panel.curves if curve.optional)
    )
    for method in (*methods, *extra):
        if method not in known:
            raise ConfigError(f"Campaign {campaign.name} has no method '{method}'; it has {', '.join(known)}.")
    for method in extra:
        if method not in optional:
            raise ConfigError(f"{method} is no optional method of {campaign.name}; these are {', '.join(optional)}.")
    kept = set(methods or (method for method in known if method not in optional)) | set(extra)
    panels = [
        dataclasses.replace(panel, curves=[curve for curve in panel.curves if curve.method in kept])
        for panel in campaign.panels
    ]
    return dataclasses.replace(campaign, panels=[panel for panel in panels if panel.curves])


def _check_name(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ConfigError(f"There is no {kind} '{name}'; choose one of {', '.join(known)}.")


def _load(path: Path, source: str) -> Any:
    """Return what a YAML file holds."""
    try:
        return OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {error}") from error


def _read(schema: type, values: Any, source: str) -> Any:
    """Convert YAML to dataclasses, with the file's name in the error."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {explain(error)}") from error
