"""What ``auto`` means on this machine: the device, its precision, and the rates by which the preconditioner chooses."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from kfac_sua.config import ConfigError, Device, Precision
from kfac_sua.files.openers import refuse_special
from kfac_sua.preconditioner.forms.rates import OWN_RATES, DeviceRates, rates_in_force


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device, as far as it decides about precisions and runs at the same time.

    Attributes:
        name: The maker's name for it.
        precisions: Those that it has; bfloat16 only if it is not emulated.
        memory_gib: Its memory.
    """

    name: str
    precisions: frozenset[Precision]
    memory_gib: float = math.inf

    @classmethod
    def current(cls) -> "CudaDevice":
        """Return the device of this process. From then on the process has used CUDA."""
        precisions = (Precision.float32, Precision.tf32, Precision.bfloat16)
        memory_gib = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 2**30
        return cls(torch.cuda.get_device_name(), frozenset(filter(_current_has, precisions)), memory_gib)


_known: list[CudaDevice] = []


@contextmanager
def knowing(device: CudaDevice) -> Iterator[None]:
    """Choose precisions inside by a device that another process has found, so that this one need not use CUDA."""
    _known.append(device)
    try:
        yield
    finally:
        _known.pop()


def choose_device(device: Device) -> torch.device:
    """Return the device to train on.

    Args:
        device: ``auto`` takes CUDA where there is a usable device.

    Returns:
        The device, of type ``cpu`` or ``cuda``.

    Raises:
        ConfigError: If CUDA is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if device is Device.cuda and not has_cuda:
        raise ConfigError("device=cuda, but PyTorch finds no usable CUDA device here; use device=cpu or device=auto.")
    return torch.device("cuda" if has_cuda and device is not Device.cpu else "cpu")


def device_type(device: Device) -> str:
    """Return ``cpu`` or ``cuda``: for ``auto`` what this machine has, otherwise what is asked for.

    Args:
        device: As configured.
    """
    return choose_device(device).type if device is Device.auto else device.value


def choose_precision(precision: Precision, device: str) -> Precision:
    """Return the precision to train in.

    Args:
        precision: As configured; ``auto`` takes TF32 on CUDA devices that have it, and float32 elsewhere.
        device: ``cpu`` or ``cuda``. Without CUDA here, it is a device of another machine, and counts as one that has
            TF32 and bfloat16, as all devices since 2020 do.

    Returns:
        Any but ``auto``.

    Raises:
        ConfigError: If the device does not have the precision that is asked for.
    """
    if precision is Precision.auto:
        return Precision.tf32 if _has(Precision.tf32, device) else Precision.float32
    if not _has(precision, device):
        where = (_known[-1].name if _known else torch.cuda.get_device_name()) if device == "cuda" else "the CPU"
        raise ConfigError(
            f"precision={precision}, which {where} does not have; use precision=float32 or precision=auto."
        )
    return precision


def rates_as_configured(path: str | None, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which the preconditioner chooses by other rates.

    Args:
        path: As configured: a file, or ``cpu`` or ``cuda`` for the project's own; ``None`` changes nothing.
        device: The device whose rates they are.

    Raises:
        ConfigError: If the file cannot be read or holds no such rates.
    """
    if path is None:
        return nullcontext()
    try:
        if path not in OWN_RATES:
            refuse_special(path)
        return rates_in_force(OWN_RATES[path] if path in OWN_RATES else DeviceRates.read(path), device.type)
    except OSError as error:
        raise ConfigError(
            f"device_rates={path}: {error.strerror or error}; give a file of kfac_sua.bench.device_rates, cpu or cuda."
        ) from error
    except ValueError as error:
        raise ConfigError(f"device_rates: {error}") from error


def _has(precision: Precision, device: str) -> bool:
    if device != "cuda":
        return precision is not Precision.tf32  # autocast emulates bfloat16 where it must
    if not torch.cuda.is_available():
        return True
    return precision in _known[-1].precisions if _known else _current_has(precision)


def _current_has(precision: Precision) -> bool:
    """Whether the CUDA device of this process has a precision."""
    if precision is Precision.tf32:
        return torch.cuda.is_tf32_supported()
    return precision is not Precision.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
