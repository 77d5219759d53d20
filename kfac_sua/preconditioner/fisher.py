"""Output gradients that define the Fisher information: cotangents to send backward from the model's output.

A cotangent is a gradient of the un-averaged loss with respect to the outputs, so that it is not rescaled by the batch
size. The sum of c cᵀ over an example's cotangents c is the Fisher information of its output distribution: exactly for
``exact``, in expectation for ``mc``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kfac_sua.preconditioner.settings import FisherType, Likelihood


def fisher_cotangents(
    outputs: Tensor,
    fisher_type: FisherType,
    likelihood: Likelihood,
    generator: torch.Generator,
    place: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Yield the cotangents of one mini-batch, each shaped like ``outputs``.

    Args:
        outputs: Model outputs: logits ``[n, classes]`` for ``categorical``, any shape ``[n, ...]`` for ``gaussian``.
        fisher_type: ``mc`` yields one sampled cotangent; ``exact`` one per class (or output element).
        likelihood: The distribution of the outputs.
        generator: Random generator for sampled labels, on the outputs' device.
        place: Where processes share a mini-batch: the number of examples before these, and of all examples. Every
            process then draws labels for all examples and takes its own, so that they are those that one process would
            draw. ``None`` where these are all examples.

    Reference: Martens & Grosse (2015), Sec. 5: targets sampled from the model; Laurent et al. (2018), footnote 1.

    Raises:
        ValueError: If ``categorical`` gets outputs that are not ``[n, classes]``, or ``fisher_type`` is ``empirical``.
    """
    outputs = outputs.detach()
    if likelihood is Likelihood.categorical and outputs.dim() != 2:
        raise ValueError(
            f"likelihood=categorical needs logits of shape [examples, classes], got {list(outputs.shape)}; "
            f"flatten extra dimensions, or use likelihood=gaussian or fisher_type=empirical."
        )
    if fisher_type is FisherType.mc:
        sample = _sampled_categorical if likelihood is Likelihood.categorical else _sampled_gaussian
        yield sample(outputs, generator, place or (0, len(outputs)))
    elif fisher_type is FisherType.exact:
        yield from _exact_categorical(outputs) if likelihood is Likelihood.categorical else _exact_gaussian(outputs)
    else:
        raise ValueError("fisher_type=empirical takes its output gradients from the training loss, not from here.")


def within_generator(seed: int) -> int:
    """Return a seed that ``torch.Generator.manual_seed`` accepts: the seed itself, or else its remainder modulo 2⁶⁴."""
    return seed if -(2**63) <= seed < 2**64 else seed % 2**64


def _sampled_categorical(logits: Tensor, generator: torch.Generator, place: tuple[int, int]) -> Tensor:
    """Return ∂(−log p_y)/∂logits = p − e_y with y drawn from p; NaN for examples whose logits are not finite.

    y is the label that ``torch.multinomial`` would draw, whose checks wait for the device and raise on NaN.
    """
    probabilities = logits.softmax(-1)
    first, total = place
    waiting_times = probabilities.new_empty(total, logits.shape[1]).exponential_(generator=generator)
    waiting_times = waiting_times[first : first + len(logits)]  # [n, classes]
    labels = (probabilities / waiting_times).argmax(-1, keepdim=True)
    return probabilities.scatter_add(1, labels, torch.full_like(labels, -1, dtype=logits.dtype))


def _sampled_gaussian(outputs: Tensor, generator: torch.Generator, place: tuple[int, int]) -> Tensor:
    """Return ∂½‖y − f‖²/∂f = f − y with y drawn from N(f, I), a standard normal draw; NaN where f is not finite."""
    first, total = place
    shape = (total, *outputs.shape[1:])
    draw = torch.randn(shape, generator=generator, dtype=outputs.dtype, device=outputs.device)
    return draw[first : first + len(outputs)] + outputs * 0


def _exact_categorical(logits: Tensor) -> Iterator[Tensor]:
    """Yield √p_c (p − e_c) for every class c."""
    probabilities = logits.softmax(-1)
    for label in range(logits.shape[1]):
        cotangent = probabilities.clone()
        cotangent[:, label] -= 1
        yield cotangent * probabilities[:, label : label + 1].sqrt()


def _exact_gaussian(outputs: Tensor) -> Iterator[Tensor]:
    """Yield the unit vector of every output element, for all examples at once; NaN where the output is not finite."""
    flat = outputs.reshape(len(outputs), -1) * 0  # [n, elements]
    for element in range(flat.shape[1]):
        cotangent = flat.clone()
        cotangent[:, element] += 1
        yield cotangent.view_as(outputs)  # [n, ...]
