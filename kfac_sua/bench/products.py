"""How exact each way to multiply by an inverse is: ``python -m kfac_sua.bench.products dataset=digits``.

A network is trained, its factors are measured on one mini-batch, and the gradient of another is preconditioned: in
float64, and in float32 with both operands of every product rounded as tensor cores round them. The difference counts in
two norms: the plain one, and that of the layer's Fisher block, which is what a step does to the loss.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from kfac_sua.bench.tables import table
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, say
from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, Device, Precision, ProgressStyle
from kfac_sua.data.archive import DataError
from kfac_sua.device import choose_device
from kfac_sua.files.atomic import refuse_unwritable, write_atomically
from kfac_sua.files.openers import cannot_use
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.apply import precondition_, quadratic_form
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import DenseInverse, Inverse
from kfac_sua.preconditioner.kronecker import KroneckerInverse
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.startup import run_command
from kfac_sua.training.build import build_training
from kfac_sua.training.loop import train_epoch
from kfac_sua.training.progress import Progress

DAMPINGS = (1.0, 0.1, 0.01)
STRUCTURES = ("kfac", "sua")

MANTISSA_BITS = {"TF32": 10, "bfloat16": 7}
FLOAT32_BITS = 23


@dataclasses.dataclass(frozen=True)
class ProductError:
    """The relative error of a preconditioned gradient.

    Args:
        structure: Of the preconditioner.
        damping: Its damping.
        layer: Name of the layer.
        product: How its inverse was multiplied: ``float32``, ``TF32``, ``bfloat16`` or ``bf16x3``.
        plain: In the plain norm.
        fisher: In the norm of the layer's Fisher block.
    """

    structure: str
    damping: float
    layer: str
    product: str
    plain: float
    fisher: float


def rounded(values: Tensor, mantissa_bits: int) -> Tensor:
    """Return finite float32 numbers rounded to fewer bits, to the nearest, ties to even."""
    dropped = FLOAT32_BITS - mantissa_bits
    bits = values.contiguous().view(torch.int32)
    last_kept = (bits >> dropped) & 1
    return ((bits + (1 << (dropped - 1)) - 1 + last_kept) >> dropped << dropped).view(torch.float32)


@dataclasses.dataclass
class RoundedInverse(Inverse):
    """Inverse blocks whose products round both operands first, and sum in float32."""

    blocks: Tensor
    bits: int

    names: ClassVar[tuple[str, ...]] = ("blocks",)
    form: ClassVar[str] = "rounded"

    def left(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, d, n]`` from the left."""
        return torch.bmm(rounded(self.blocks, self.bits), rounded(values, self.bits))

    def right(self, values: Tensor) -> Tensor:
        """Multiply ``[num_blocks, n, d]`` from the right."""
        return torch.bmm(rounded(values, self.bits), rounded(self.blocks, self.bits))


PRODUCTS: dict[str, Callable[[Tensor], Inverse]] = {
    "float32": DenseInverse,
    "TF32": lambda blocks: RoundedInverse(blocks, MANTISSA_BITS["TF32"]),
    "bfloat16": lambda blocks: RoundedInverse(blocks, MANTISSA_BITS["bfloat16"]),
    "bf16x3": lambda blocks: DenseInverse(blocks).split(),
}


def measure_errors(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], structure: str, damping: float
) -> Iterator[ProductError]:
    """Yield the errors of all layers and products.

    Args:
        model: The network, on a CPU and in float32, as TF32 and bfloat16 are emulated.
        losses: Return the mean loss of a mini-batch: of that which factors are measured on, and of another.
        structure: ``kfac`` or ``sua``.
        damping: Tikhonov ε.
    """
    preconditioner = KroneckerPreconditioner(
        model, structure=structure, damping=damping, inverse_method="cholesky", products="ieee"
    )
    for layer in preconditioner.layers:
        layer.keeps_factors = True
    with preconditioner.capture():
        losses[0]().backward()
    preconditioner.update_factors()
    preconditioner.update_inverses()
    preconditioner.remove_hooks()
    if any(layer.inverse is None for layer in preconditioner.layers):
        raise RuntimeError("The training diverged, so that there are no factors to invert; lower optimizer.lr.")
    model.zero_grad()
    losses[1]().backward()
    for layer in preconditioner.layers:
        for product, (plain, fisher) in _errors(layer).items():
            yield ProductError(structure, damping, layer.name, product, plain, fisher)
    model.zero_grad()


@torch.no_grad()
def _errors(layer: PreconditionedLayer) -> dict[str, tuple[float, float]]:
    """Return the relative errors of a layer's preconditioned gradient in both norms, against the same in float64."""
    inverse, factors = layer.inverse, layer.factors
    assert isinstance(inverse, KroneckerInverse)
    assert isinstance(factors, LayerFactors)
    activation, gradient = (side.tensors()["blocks"] for side in (inverse.activation, inverse.gradient))
    exact_factors = dataclasses.replace(
        factors,
        activation=factors.activation.with_values(factors.activation.values.double()),
        gradient=factors.gradient.with_values(factors.gradient.values.double()),
    )

    def squares(weight: Tensor, bias: Tensor | None) -> tuple[float, float]:
        plain = weight.square().sum() + (0.0 if bias is None else bias.square().sum())
        return float(plain), float(quadratic_form(weight, bias, layer.layout, exact_factors).clamp(min=0))

    in_float64 = DenseInverse(activation.double()), DenseInverse(gradient.double())
    want = _preconditioned(layer, KroneckerInverse(*in_float64, inverse.bias_scale.double()))
    of_whole = squares(*want)
    errors = {}
    for product, form in PRODUCTS.items():
        got = _preconditioned(layer, KroneckerInverse(form(activation), form(gradient), inverse.bias_scale))
        of_error = squares(got[0] - want[0], None if got[1] is None or want[1] is None else got[1] - want[1])
        plain, fisher = ((error / whole) ** 0.5 for error, whole in zip(of_error, of_whole, strict=True))
        errors[product] = plain, fisher
    return errors


def _preconditioned(layer: PreconditionedLayer, inverse: KroneckerInverse) -> tuple[Tensor, Tensor | None]:
    """Return a layer's gradients, preconditioned in the inverse's precision, in float64."""
    grads = [None if one is None or one.grad is None else one.grad for one in (layer.weight, layer.bias)]
    weight, bias = (None if grad is None else grad.to(inverse.reference_tensor.dtype, copy=True) for grad in grads)
    assert weight is not None
    precondition_(weight, bias, layer.layout, inverse)
    return weight.double(), None if bias is None else bias.double()


def train_and_measure(config: Config) -> list[ProductError]:
    """Train one epoch of a configuration on the CPU, and return the errors for it.

    Raises:
        DataError: If the data set cannot be had, is damaged or too small.
    """
    training = build_training(dataclasses.replace(config, precision=Precision.float32), choose_device(config.device))
    with contextlib.closing(training):
        steps = len(training.loader)
        train_epoch(training, Progress(ProgressStyle.none, "", total_steps=steps, done_steps=0, epochs=1))
        if training.preconditioner is not None:
            training.preconditioner.remove_hooks()
        training.batch = 0
        training.begin_epoch()
        batches = [training.loader.next_batch() for _ in range(2)]
        batches = [(inputs.clone(), labels.clone()) for inputs, labels in batches]
        losses = [lambda pair=pair: nn.functional.cross_entropy(training.model(pair[0]), pair[1]) for pair in batches]
        return [
            error
            for structure in STRUCTURES
            for damping in DAMPINGS
            for error in measure_errors(training.model, losses, structure, damping)
        ]


def errors_table(errors: Sequence[ProductError], title: str) -> str:
    """Return the errors of the worst layer, in the plain norm and in that of the Fisher block."""
    settings = list(dict.fromkeys((error.structure, error.damping) for error in errors))
    rows = []
    for product in PRODUCTS:
        cells = []
        for structure, damping in settings:
            own = [e for e in errors if (e.structure, e.damping, e.product) == (structure, damping, product)]
            cells.append(f"{max(e.plain for e in own):.0e} / {max(e.fisher for e in own):.0e}")
        rows.append([product, *cells])
    return table(title, ["product", *(f"{structure} ε {damping:g}" for structure, damping in settings)], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code: 0, 1 for failure, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.bench.products", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of configs/config.yaml; its first epoch is trained, on a CPU"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers here")
    options = parser.parse_args(arguments)
    try:
        if options.json:
            refuse_unwritable(options.json)
        config = compose_config(["device=cpu", *options.overrides])
        if config.device is not Device.cpu:
            raise ConfigError(f"device={config.device}, but what tensor cores do is emulated on the CPU; leave it out.")
        errors = train_and_measure(config)
        model = f"{config.model.name} width {config.model.width:g} on {config.dataset.name}"
        print(errors_table(errors, f"Relative error of the worst layer, plain norm / Fisher's norm; {model}"))
        if options.json:
            text = json.dumps([dataclasses.asdict(error) for error in errors], indent=1)
            write_atomically(options.json, (text + "\n").encode())
    except (ConfigError, DataError) as error:
        return say(str(error), BAD_INPUT)
    except RuntimeError as error:
        return say(str(error), FAILED)
    except OSError as error:
        return say(cannot_use(error), BAD_INPUT)
    except KeyboardInterrupt:
        return say("interrupted; nothing was written.", INTERRUPTED)
    return 0


if __name__ == "__main__":
    run_command(main)
