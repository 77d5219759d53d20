"""What is kept of a study: a row per number's place, a file per part, and the settings that all parts share."""

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import read_regular

SAME, OTHER = "same", "other"
"""Images that a structure's statistics are of: those of the exact Fisher, or of another mini-batch."""
LAYER, BLOCKS, NETWORK = "layer", "blocks", "network"
"""What is compared: one layer's block; all layers with the exact blocks on the diagonal; all layers with the exact
Fisher over all of them."""


class IntrospectionError(Exception):
    """Something that cannot be measured or used; the message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one approximation at one damping; NaN for what a zero gradient or Fisher leaves undefined.

    Attributes:
        statistics: ``same`` or ``other``.
        scope: ``layer``, ``blocks`` or ``network``.
        layer: Name of the layer; empty for all of them.
        parameters: Parameters in the scope.
        method: An item of ``--methods``, or a line of reference.
        damping: ε.
        relative_error: ‖F − K‖/‖F‖; it and the next four do not depend on the damping.
        cosine: ⟨F, K⟩/(‖F‖‖K‖).
        trace_ratio: tr K/tr F.
        basis_error: What of the relative error K's eigenbasis causes.
        eigenvalue_error: What its eigenvalues cause.
        direction_cosine: Cosine between the preconditioned gradient and (F + εI)⁻¹v.
        share: Share of the attainable decrease of the damped quadratic model.
    """

    statistics: str
    scope: str
    layer: str
    parameters: int
    method: str
    damping: float
    relative_error: float
    cosine: float
    trace_ratio: float
    basis_error: float
    eigenvalue_error: float
    direction_cosine: float
    share: float


@dataclasses.dataclass(frozen=True)
class Part:
    """What is measured and kept in one go.

    Attributes:
        seed: Seed of the run, and of the images that are drawn.
        checkpoint: Name of the state of the network.
        fisher: ``empirical``, ``mc`` or ``exact``.
    """

    seed: int
    checkpoint: str
    fisher: str

    @property
    def name(self) -> str:
        """The name of its file, without ending."""
        return f"seed{self.seed}-{self.checkpoint}-{self.fisher}"


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What measured a part.

    Attributes:
        commit: Commit of the source, with ``+dirty`` for changes; empty outside of a checkout.
        torch: Version of PyTorch.
        device_name: Name of the processor or the GPU.
    """

    commit: str
    torch: str
    device_name: str


MEASURES = tuple(field.name for field in dataclasses.fields(Row) if field.type is float and field.name != "damping")
PART_COLUMNS = ("seed", "checkpoint", "step", "fisher", "images", "loss")
COLUMNS = (*PART_COLUMNS, *(field.name for field in dataclasses.fields(Row)))


def write_part(
    directory: Path, part: Part, rows: Iterable[Row], provenance: Provenance, *, step: int, images: int, loss: float
) -> None:
    """Write the rows of a part, so that an interruption leaves all of them or none.

    Args:
        directory: Of all parts, made if missing.
        part: Which.
        rows: Its rows.
        provenance: What measured it.
        step: Optimisation steps that the network had taken.
        images: Images of the exact Fisher.
        loss: Their mean loss, in nats.
    """
    shared = dataclasses.asdict(part) | {"step": step, "images": images, "loss": loss}
    frame = pd.DataFrame([shared | dataclasses.asdict(row) for row in rows], columns=list(COLUMNS))
    directory.mkdir(parents=True, exist_ok=True)
    measured_by = json.dumps(dataclasses.asdict(provenance), indent=1) + "\n"
    write_atomically(directory / f"{part.name}.json", measured_by.encode())
    write_atomically(directory / f"{part.name}.csv", as_csv(frame))  # last, as it says that the part is there


def as_csv(frame: pd.DataFrame) -> bytes:
    """Return a table as a file, numbers with seven digits: more than the labels of a mini-batch leave certain."""
    return frame.to_csv(index=False, float_format="%.7g").encode()


def read_table(path: Path) -> pd.DataFrame:
    """Return a part's rows, or those of all parts together.

    Args:
        path: The file.

    Raises:
        IntrospectionError: If it is not such a table.
        OSError: If it cannot be read.
    """
    try:
        frame = pd.read_csv(
            io.BytesIO(read_regular(path)),
            dtype={"layer": "str"},
            keep_default_na=False,
            na_values={name: [""] for name in MEASURES},
        )
        if list(frame.columns) != list(COLUMNS):
            raise ValueError("other columns")
    except ValueError as error:  # pandas' own errors are ValueErrors
        raise IntrospectionError(
            f"{path} is not a table that this version wrote ({' '.join(str(error).split())}); move it away."
        ) from error
    return frame


def read_parts(directory: Path, parts: Sequence[Part]) -> pd.DataFrame:
    """Return the rows of parts that are there, in their order."""
    frames = [read_table(path) for part in parts if (path := directory / f"{part.name}.csv").exists()]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(COLUMNS))


def read_provenances(directory: Path, parts: Sequence[Part]) -> list[Provenance]:
    """Return what measured the parts that are there, each once.

    Raises:
        IntrospectionError: If a file is damaged.
        OSError: If one cannot be read.
    """
    found: dict[Provenance, None] = {}
    for part in parts:
        path = directory / f"{part.name}.json"
        if path.exists():
            try:
                found[Provenance(**json.loads(read_regular(path)))] = None
            except (ValueError, TypeError) as error:
                raise IntrospectionError(f"{path} is damaged ({error}); remove it with its CSV file.") from error
    return list(found)


def keep_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that all parts of a directory share, or check that they are those that are there.

    Settings of which nothing has been measured are replaced, since their command failed or was stopped before, and
    networks that were trained for them are removed if these settings train others.

    Args:
        path: The file, JSON.
        settings: Plain values by name.

    Raises:
        IntrospectionError: If parts of other settings lie there; the message names the first setting that differs.
    """
    wanted = json.loads(json.dumps(settings))  # tuples as lists, as in the file
    if path.exists():
        try:
            known = json.loads(read_regular(path))
        except ValueError as error:
            raise IntrospectionError(f"{path} is damaged ({error}); remove it with its directory.") from error
        difference = _first_difference(known, wanted)
        if difference is None:
            return
        if any(path.parent.glob("parts/*.csv")):
            raise IntrospectionError(f"{path.parent} holds measurements {difference}; give another --out.")
        if any(known.get(name) != wanted.get(name) for name in ("config", "steps")):
            for network in path.parent.glob("networks/seed*.pt"):
                network.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())


def _first_difference(known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> str | None:
    """Return in words where two trees of settings differ first, in alphabetical order; ``None`` if they do not."""
    for name in sorted(known.keys() | wanted.keys()):
        place = f"{prefix}{name}"
        if name not in known:
            return f"without {place}, which is given here"
        if name not in wanted:
            return f"with {place}, which is not given here"
        own, other = known[name], wanted[name]
        if isinstance(own, dict) and isinstance(other, dict):
            difference = _first_difference(own, other, f"{place}.")
            if difference is not None:
                return difference
        elif own != other:
            return f"with {place} {json.dumps(own)}, here it is {json.dumps(other)}"
    return None
