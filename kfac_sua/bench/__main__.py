"""The benchmark command: ``python -m kfac_sua.bench --settings baseline sua kfac:damping=0.3 --json new.json``."""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from kfac_sua.bench.against import changes, circumstances, refuse_other_capture, refuse_other_conditions
from kfac_sua.bench.arithmetic import FLOAT64, NAMES
from kfac_sua.bench.contender import STEPS_TOGETHER
from kfac_sua.bench.measure import Plan, carry_out
from kfac_sua.bench.record import Arguments, read_record, write_record
from kfac_sua.bench.settings import (
    DEFAULT_SETTINGS,
    PERIOD_KEY,
    Setting,
    base_config,
    common_period,
    compose_settings,
    cpu_threads,
    parse_items,
)
from kfac_sua.bench.tables import (
    changes_table,
    costs_table,
    layers_table,
    memory_table,
    operations_table,
    rates_table,
    split_table,
    steps_table,
)
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, as_number, count, say
from kfac_sua.config import Config, ConfigError, KroneckerConfig, Precision
from kfac_sua.device import choose_device, choose_precision
from kfac_sua.files.atomic import refuse_unwritable
from kfac_sua.files.openers import cannot_use
from kfac_sua.preconditioner import FisherType
from kfac_sua.runs.run_info import RecordError
from kfac_sua.startup import run_command
from kfac_sua.training.capturing import why_no_graphs

SLOWER = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if all is well, 1 if a setting got slower than in ``--against`` or the measurement failed, 2 for bad input,
        130 after Ctrl-C.
    """
    options = _parser().parse_intermixed_args(arguments)
    try:
        return _carry_out(options)
    except (ConfigError, RecordError) as error:
        return say(str(error), BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error), BAD_INPUT)
    except (RuntimeError, MemoryError) as error:
        return say(" ".join(str(error).split()) or "MemoryError.", FAILED)
    except KeyboardInterrupt:
        return say("interrupted; nothing was written.", INTERRUPTED)


def _carry_out(options: argparse.Namespace) -> int:
    plan = _plan(options)
    names = [setting.name for setting in plan.settings]
    old = read_record(options.against) if options.against else None
    if old is not None:
        shared = [cost.setting for cost in old.costs if cost.setting in names]
        refuse_other_conditions(options.against, old.arguments, plan.arguments, shared)
        if not any(setting.config.capture for setting in plan.settings):
            refuse_other_capture(options.against, old.costs, dict.fromkeys(shared, False))
    if options.json:
        refuse_unwritable(options.json)
    record = carry_out(plan)
    if options.json:
        write_record(options.json, record)
    tables = [costs_table(record), split_table(record.costs), memory_table(record.costs)]
    tables += [operations_table(record.costs), rates_table(record.rates)]
    if record.steps:
        tables.append(steps_table(record.steps, record.rates, plan.arithmetic))
    if record.layers:
        tables.append(layers_table(record.layers, record.rates, plan.arithmetic))
    print("\n\n".join(tables))
    if old is None:
        return 0
    refuse_other_capture(options.against, old.costs, {cost.setting: cost.is_captured for cost in record.costs})
    changed = changes(old, record)
    print("\n" + changes_table(changed, options.tolerance))
    for difference in circumstances(old, record):
        print(f"note: {difference}")
    return SLOWER if any(change.relative > options.tolerance for change in changed) else 0


def _plan(options: argparse.Namespace) -> Plan:
    """Compose and check all that the options ask for, before anything is measured."""
    # --settings takes all words up to the next option, also overrides that no setting is meant by.
    is_override = [":" not in item.partition("=")[0] and "=" in item for item in options.settings]
    items = parse_items([item for item, is_key in zip(options.settings, is_override, strict=True) if not is_key])
    overrides = [*options.overrides, *(i for i, is_key in zip(options.settings, is_override, strict=True) if is_key)]
    values = {
        "model": options.model,
        "model.width": options.width,
        "batch_size": options.batch_size,
        "device": options.device,
        "num_threads": options.threads,
        PERIOD_KEY: options.period,
        "precision": Precision.float32 if options.precision == FLOAT64 else options.precision,
    }
    base = base_config(overrides, values)
    values["num_threads"] = cpu_threads(base)
    settings = compose_settings(items, overrides, values)
    if options.layers:
        _refuse_exact_fisher(settings)
    device = choose_device(base.device)
    if base.capture is True and (reason := why_no_graphs(device)):
        raise ConfigError(f"capture=true, but {reason}; give capture=auto or capture=false.")
    arguments = Arguments(
        model=base.model.name.value,
        width=base.model.width,
        batch_size=base.batch_size,
        period=common_period(base),
        device=device.type,
        precision=_precision(options.precision, base, overrides),
        num_threads=values["num_threads"] or torch.get_num_threads(),
        overrides=overrides,
        rounds=options.rounds,
        refresh_rounds=options.refresh_rounds,
        repeats=options.repeats,
        steps_together=STEPS_TOGETHER[device.type],
    )
    return Plan(settings, arguments, with_layers=options.layers, with_compiled=options.compiled)


def _precision(option: str, base: Config, overrides: Sequence[str]) -> str:
    """Return the name of the arithmetic; like other keys, ``precision=…`` stands above the option."""
    is_overridden = any(text.partition("=")[0] == "precision" for text in overrides)
    if option == FLOAT64 and not is_overridden:
        return FLOAT64
    return choose_precision(base.precision, choose_device(base.device).type).value


def _refuse_exact_fisher(settings: Sequence[Setting]) -> None:
    for setting in settings:
        preconditioner = setting.config.preconditioner
        if isinstance(preconditioner, KroneckerConfig) and preconditioner.fisher_type is FisherType.exact:
            raise ConfigError(
                f"--layers measures one backward pass per layer, but setting {setting.name} has fisher_type=exact, "
                "with one per class; leave out --layers, or use empirical or mc."
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kfac_sua.bench",
        description="Time, memory and FLOPs of preconditioned steps beside plain SGD's in the same process: the "
        "settings take turns step by step, and medians count; process CPU time on a CPU, wall time on a GPU.",
        epilog="Exit code: 0, 1 if a setting got slower than in --against, 2 for bad input.",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="further keys of configs/config.yaml, for all settings"
    )
    parser.add_argument("--model", default="vgg11", help="vgg11, preact_resnet50, transformer or tiny (%(default)s)")
    parser.add_argument("--width", type=float, default=1.0, metavar="X", help="of the network (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=100, metavar="N", help="images (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    parser.add_argument(
        "--precision",
        choices=NAMES,
        default="auto",
        help="of convolutions and matrix products: auto takes tf32 where CUDA has it, else float32; bfloat16 is "
        "autocast; factors are float32, but everything is float64 in float64 (%(default)s)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU (1 where it trains there)")
    parser.add_argument("--period", type=int, metavar="N", help="mini-batches between refreshes (as configured: 50)")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=DEFAULT_SETTINGS,
        metavar="NAME[:key=value,…]",
        help=f"of {', '.join(DEFAULT_SETTINGS)}, each with keys of its own such as kfac:damping=0.3,ema_decay=0.9; "
        "baseline is always measured (all five)",
    )
    parser.add_argument(
        "--rounds",
        type=count,
        default=9,
        metavar="N",
        help="plain steps per setting; on CUDA up to 10 each (%(default)s)",
    )
    parser.add_argument(
        "--refresh-rounds", type=count, default=3, metavar="N", help="steps of each other kind (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=count, default=1, metavar="N", help="measure it all so often: median (low to high) (1)"
    )
    parser.add_argument("--layers", action="store_true", help="also FLOPs and seconds per part of a step and per layer")
    parser.add_argument(
        "--compiled", action="store_true", help="also plain SGD through torch.compile, as a row of that name"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers here")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with what --json wrote earlier")
    parser.add_argument(
        "--tolerance", type=_fraction, default=0.03, metavar="X", help="growth that --against lets pass (%(default)s)"
    )
    return parser


def _fraction(text: str) -> float:
    value = as_number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number ≥ 0 such as 0.03, got '{text}'")
    return value


if __name__ == "__main__":
    run_command(main)
