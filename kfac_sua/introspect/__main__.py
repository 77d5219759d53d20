"""How far each approximation of the Fisher is from it on a network in training, and what that closeness buys.

Command line: ``python -m kfac_sua.introspect RUN_DIR`` looks at a run's network before its first step, at its best
epoch and at its last; ``python -m kfac_sua.introspect key=value ...`` trains a short run of that configuration and
looks at it untrained, early, in the middle and at the end. The same command again measures only what is missing.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import contextlib
import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.settings import BASELINE, Item, parse_items
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, as_number, count, keep_command, kept_command, say
from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, Device, KroneckerConfig
from kfac_sua.data import DataError
from kfac_sua.device import choose_device
from kfac_sua.figures.introspection import draw_introspection
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.lock import RunBusyError, exclusive
from kfac_sua.files.openers import cannot_use
from kfac_sua.introspect.looks import styles_of
from kfac_sua.introspect.networks import FRACTIONS, SAVED, UNTRAINED, FreshRun, SavedRun, Source
from kfac_sua.introspect.record import IntrospectionError, Part, Provenance, keep_settings, read_parts, read_provenances
from kfac_sua.introspect.report import ReportInput, describe, page_title
from kfac_sua.introspect.study import INHERITED, Study, measure_part, state_memory, title_of
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import LARGEST_FLOAT, LEAST_FLOAT, FisherType, KroneckerSettings
from kfac_sua.report_page import render_html
from kfac_sua.runs.environment import environment
from kfac_sua.runs.run_info import RecordError, failure_reason
from kfac_sua.startup import run_command
from kfac_sua.training.checkpoint import CheckpointError

METHODS = (
    *("eigenvalue_corrected", "kfac", "grouped", "sua", "sua_grouped", "activation_only"),
    *("kfac:weight_sharing=reduce", "sua:weight_sharing=reduce"),
)
DAMPINGS = (0.01, 0.1, 1.0)
IMAGES, STEPS = 200, 300
DECIDED = {
    **{"fisher_type": "--fisher decides it", "damping": "--damping decides it", "skip": "--layers decides it"},
    **{"likelihood": "it is that of cross-entropy", "loss_reduction": "it is that of the measurement"},
    **dict.fromkeys(("inverse_period", "factor_period", "ema_decay"), "statistics are of one mini-batch"),
    **dict.fromkeys(("damping_final", "adaptive_damping"), "--damping decides each ε"),
    **dict.fromkeys(("application", "kl_clip", "allow_exact_fisher"), "it changes no direction here"),
}
"""Keys of a preconditioner that an item of --methods cannot have, and why."""
PER_ROW = 5
"""Images of the other Fishers for each of the exact one, which has a row per image and class."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if everything is done, 1 if it cannot be, 2 for bad input, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(given)
    keep_command("kfac_sua.introspect", given)
    try:
        _carry_out(options)
    except (ConfigError, DataError, RecordError, CheckpointError, IntrospectionError) as error:
        return say(error, BAD_INPUT)
    except RunBusyError as error:
        return say(str(error).replace("trained", "measured"), FAILED)
    except (RuntimeError, MemoryError) as error:  # on a CPU, PyTorch's allocator raises a plain RuntimeError
        reason = failure_reason(error)
        if reason.startswith("Out of memory"):
            reason = f"{reason.removesuffix('.')}, or --images or --exact-images."
        return say(reason, FAILED)
    except OSError as error:
        return say(cannot_use(error, options.out), BAD_INPUT)
    except KeyboardInterrupt:
        return say("interrupted; the same command goes on where this one stopped.", INTERRUPTED)
    return 0


def _carry_out(options: argparse.Namespace) -> None:
    source = _source(options)
    items = parse_items(options.methods, "--methods")
    study = _study(options, source, items)
    parts = study.parts()
    with exclusive(options.out):
        keep_settings(options.out / "settings.json", study.identity())
        missing = [part for part in parts if not (options.out / "parts" / f"{part.name}.csv").exists()]
        if missing:
            _measure(study, missing, len(parts), options.out)
        _publish(options, study, parts, items)


def _measure(study: Study, missing: Sequence[Part], num_parts: int, out_dir: Path) -> None:
    """Measure what is missing, after saying what it needs."""
    found = environment(study.device.type)
    provenance = Provenance(found.commit or "", str(torch.__version__), found.device_name)
    done = num_parts - len(missing)
    print(
        f"{title_of(study)}: {len(missing)} of {num_parts} parts to measure, with {state_memory(study)}.",
        file=sys.stderr,
        flush=True,
    )
    announcer = Announcer()
    for number, part in enumerate(missing, start=done + 1):
        label = f"[{number}/{num_parts}] seed {part.seed}, {part.checkpoint}, {part.fisher} Fisher"
        started = time.perf_counter()
        try:
            # Asking for the memory has told which layers keep the plain gradient; every structure would tell it again.
            with _errors_only(logging.getLogger("kfac_sua.preconditioner")):
                measure_part(study, part, out_dir / "parts", provenance, functools.partial(announcer.show, label))
        finally:
            announcer.clear()
        print(f"{label}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    """Let a logger tell errors only, inside."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _publish(options: argparse.Namespace, study: Study, parts: Sequence[Part], items: Sequence[Item]) -> None:
    """Write table, figure and report of the study's parts, and print the report."""
    frame = read_parts(options.out / "parts", parts)
    names = {item.text: [item.group, *item.keys] for item in items}
    styles = styles_of(names, {name: settings.group_size for name, settings in study.methods.items()})
    damping = _own_damping(study)
    paths = draw_introspection(frame, options.out, damping, styles, title_of(study))
    provenances = read_provenances(options.out / "parts", parts)
    text = describe(ReportInput(study, frame, styles, damping, provenances, kept_command() or ""))
    page = render_html(text, page_title(study), {path.name: path for path in paths if path.suffix == ".png"})
    reports = {options.out / "report.md": text, options.out / "report.html": page}
    for path, content in reports.items():
        write_atomically(path, content.encode())
    print(text)
    print(f"Wrote {', '.join(map(str, [*paths, *reports]))}.")


def _own_damping(study: Study) -> float:
    """Return the damping that figure and tables show: the run's own, if it was measured, or the middle one."""
    own = study.source.config.preconditioner
    if isinstance(own, KroneckerConfig) and own.damping in study.dampings:
        return own.damping
    return sorted(study.dampings)[len(study.dampings) // 2]


def _source(options: argparse.Namespace) -> Source:
    """Return the run directory that was given, or a fresh run of the configuration."""
    # The name of a run's directory has an equals sign too.
    directories = [text for text in options.run if "=" not in text or Path(text).is_dir()]
    if directories and len(options.run) > 1:
        raise ConfigError(f"Give one run directory, or key=value for a fresh run, got {' '.join(options.run)}.")
    if directories:
        for option, name in ((options.steps, "--steps"), (options.seeds, "--seeds")):
            if option is not None:
                raise ConfigError(f"{name} is for a fresh run, but {directories[0]} has been trained; leave it out.")
        return SavedRun(Path(directories[0]))
    steps = STEPS if options.steps is None else options.steps
    wanted = options.checkpoints or tuple(FRACTIONS)
    return FreshRun(compose_config(options.run), steps, options.out / "networks", wanted)


def _study(options: argparse.Namespace, source: Source, items: Sequence[Item]) -> Study:
    checkpoints = options.checkpoints or source.defaults
    for checkpoint in checkpoints:
        if checkpoint not in source.checkpoints:
            raise ConfigError(f"--checkpoints {checkpoint}: there are {', '.join(source.checkpoints)}.")
    device = choose_device(Device(options.device) if options.device else source.config.device)
    fishers = list(dict.fromkeys(map(FisherType, options.fisher)))
    exact = max(options.images // PER_ROW, 1) if options.exact_images is None else options.exact_images
    return Study(
        source=source,
        seeds=[source.config.seed + number for number in range(options.seeds or 1)],
        checkpoints=[checkpoint for checkpoint in source.checkpoints if checkpoint in checkpoints],
        fishers=fishers,
        images={fisher: exact if fisher is FisherType.exact else options.images for fisher in fishers},
        methods=_methods(items, source.config),
        dampings=sorted(set(options.damping)),
        layer_patterns=options.layers,
        device=device,
    )


def _methods(items: Sequence[Item], config: Config) -> dict[str, KroneckerSettings]:
    """Return the settings of each item.

    What an item does not say is as in the run, where its structure reads it and it does not contradict what the item
    says: how locations are shared and chosen, where the damping goes, how factors are inverted. Groups are the run's in
    an item of the run's own name only; structures are the item's.
    """
    own, methods = config.preconditioner, {}
    for item in items:
        if item.group == BASELINE:
            raise ConfigError(f"--methods {item.text}: the plain gradient is a line of reference anyway; leave it out.")
        given = [key.partition("=")[0] for key in item.keys]
        for key in given:
            if key in DECIDED:
                raise ConfigError(f"--methods {item.text}: {key} has no influence here ({DECIDED[key]}); leave it out.")
        composed = _preconditioner(item.group, item.keys)
        if isinstance(own, KroneckerConfig):
            is_own = item.group == own.name
            wanted = (*INHERITED, *(("group_size", "group_size_scaling") if is_own else ()))
            reads = structure_class(composed.structure).reads
            for key in wanted:
                if key not in given and ("group_size" if key == "group_size_scaling" else key) in reads:
                    # What contradicts the item gives way, as activation_rows of the run to weight_sharing=reduce.
                    with contextlib.suppress(ValueError):
                        composed = dataclasses.replace(composed, **{key: getattr(own, key)})
        methods[item.text] = composed.settings(config.model.width)
    return methods


def _preconditioner(group: str, keys: Sequence[str]) -> KroneckerConfig:
    composed = compose_config([f"preconditioner={group}", *(f"preconditioner.{key}" for key in keys)]).preconditioner
    assert isinstance(composed, KroneckerConfig)
    return composed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kfac_sua.introspect",
        description="Measure, on a network in training, how far each approximation of the Fisher is from the exact one,"
        " and what share of the attainable decrease of the damped quadratic model its direction reaches. The same"
        " command again measures what is missing.",
    )
    parser.add_argument(
        "run",
        nargs="*",
        metavar="RUN_DIR | key=value",
        help="directory of a run, or the configuration of a short run that is trained first; before the options",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/introspect"), metavar="DIR", help="(%(default)s)")
    names = list(dict.fromkeys([*FRACTIONS, UNTRAINED, *SAVED]))
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        type=_value,
        choices=names,
        default=(),
        help="states of the network (of a fresh run untrained, early, middle, end; of a run untrained, best, last)",
    )
    parser.add_argument(
        "--fisher",
        nargs="+",
        type=_value,
        choices=[fisher.value for fisher in FisherType],
        default=["empirical", "exact"],
        help="labels that make the Fisher: true ones, drawn ones (mc), all (empirical exact)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        type=_value,
        default=METHODS,
        metavar="NAME[:key=value,...]",
        help=f"structures, with keys of the preconditioner ({' '.join(METHODS)})",
    )
    parser.add_argument(
        "--damping", nargs="+", type=_damping, default=DAMPINGS, metavar="EPS", help="values of ε (0.01 0.1 1)"
    )
    parser.add_argument(
        "--images", type=count, default=IMAGES, metavar="N", help="images, and as many others (%(default)s)"
    )
    parser.add_argument(
        "--exact-images", type=count, metavar="N", help=f"the same for the exact Fisher (1/{PER_ROW} of --images)"
    )
    parser.add_argument(
        "--layers", nargs="+", type=_value, default=[], metavar="PATTERN", help="such as 'features.*' (all)"
    )
    parser.add_argument("--steps", type=count, metavar="N", help=f"steps of a fresh run ({STEPS})")
    parser.add_argument("--seeds", type=count, metavar="N", help="fresh runs, from the configuration's seed on (1)")
    parser.add_argument(
        "--device", choices=[device.value for device in Device], help="where to measure (the configuration's)"
    )
    return parser


def _value(text: str) -> str:
    """Return a value of an option that takes several, if it is not the run or a key of the configuration."""
    name = text.partition(":")[0]  # after it a method has keys of its own
    if "=" in name or "/" in name or (Path(text) / "run.json").is_file():
        raise argparse.ArgumentTypeError(
            f"takes all values up to the next option, and '{text}' is none of its; put RUN_DIR or key=value first"
        )
    return text


def _damping(text: str) -> float:
    value = as_number(_value(text))
    if not LEAST_FLOAT <= value <= LARGEST_FLOAT:
        raise argparse.ArgumentTypeError(f"must be a number from {LEAST_FLOAT:g} to {LARGEST_FLOAT:g}, got '{text}'")
    return value


if __name__ == "__main__":
    run_command(main)
