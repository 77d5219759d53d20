"""What a measurement needs in memory, from the shapes of one image's pass, and what there is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_sua.introspect.approximations import factor_numbers, keeps_rows
from kfac_sua.introspect.record import IntrospectionError
from kfac_sua.preconditioner.large import device_memory
from kfac_sua.preconditioner.model.module_geometry import geometry_of
from kfac_sua.preconditioner.settings import KroneckerSettings

_BYTES = 8  # of a float64
_GRAPH_COPIES = 3
"""Tensors of the size of a layer's input and output that autograd keeps beside those: of normalisation and ReLU."""
_GRAMS = 12
"""Matrices as wide as there are rows at a time: three sums over layers, and of a layer two Gram matrices, their
product, two eigenbases, and what an eigendecomposition takes meanwhile."""
_CHUNKS = 512 * 2**20
"""Bytes of patches and of rotated rows with the copies made of them; both are cut into chunks of 64 MiB."""


def bytes_needed(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    image: Tensor,
    methods: Sequence[KroneckerSettings],
    *,
    images: int,
    backward_passes: int,
    num_dampings: int,
) -> int:
    """Return the bytes that a measurement needs at most at a time, beside PyTorch, network and data set.

    Args:
        model: The network, in evaluation mode.
        layers: The layers that are looked at.
        image: One image as the network takes it, ``[1, channels, height, width]``.
        methods: Settings of the structures.
        images: Images of the exact Fisher, and as many others.
        backward_passes: Rows per image: the number of classes for the exact Fisher, 1 otherwise.
        num_dampings: Number of values of ε.
    """
    sizes = _numbers_per_image(model, layers, image)
    rows = images * backward_passes
    parameters = {name: sum(one.numel() for one in module.parameters()) for name, module in layers.items()}
    factors = [number for settings in methods for number in factor_numbers(model, settings).values()]
    passes = sum(taken + backward_passes * given for taken, given, _ in sizes.values())
    graph = _GRAPH_COPIES * sum(taken + given for taken, given, _ in sizes.values())
    patches = max(patch for _, _, patch in sizes.values())
    # Inputs and output gradients that structures copy, of one of them at a time.
    copied = sum(taken + backward_passes * given for taken, given, _ in sizes.values())
    copied *= images * any(keeps_rows(settings) for settings in methods)
    kept = 2 * sum(factors) + 2 * len(methods) * num_dampings * sum(parameters.values())
    held = copied + kept + 2 * images * passes
    of_layer = 2 * rows * max(parameters.values()) + _GRAMS * rows**2 + 4 * max(factors)
    return _BYTES * (held + images * (graph + patches) + of_layer) + _CHUNKS


def refuse_too_little(needed: int, device: torch.device, *, largest: str) -> str:
    """Return what is needed and what there is, in words.

    Args:
        needed: Result of :func:`bytes_needed`.
        device: Where it is needed.
        largest: The Fisher that needs most.

    Raises:
        IntrospectionError: If it does not fit.
    """
    free = free_bytes(device)
    place = "the GPU" if device.type == "cuda" else "this machine"
    if free is None:
        return f"about {needed / 2**30:.1f} GiB of memory"
    if needed > free:
        cure = "lower --exact-images, or take --fisher mc" if largest == "exact" else "lower --images"
        raise IntrospectionError(
            f"This needs about {needed / 2**30:.1f} GiB of memory, but {place} has {free / 2**30:.1f} GiB free; {cure},"
            " or choose layers with --layers."
        )
    return f"about {needed / 2**30:.1f} GiB of memory, of {free / 2**30:.1f} GiB free on {place}"


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; all it has where a system does not tell more; ``None`` if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024  # in KiB
    return device_memory(device)


@torch.no_grad()
def _numbers_per_image(
    model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d], image: Tensor
) -> dict[str, tuple[int, int, int]]:
    """Return per layer the numbers of an image in its inputs, in its outputs and in its unfolded patches."""
    sizes: dict[str, tuple[int, int, int]] = {}
    names = {id(module): name for name, module in layers.items()}

    def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        taken, given, _ = sizes.get(names[id(module)], (0, 0, 0))
        locations = output.numel() // len(module.weight)
        patches = locations * module.weight[0].numel() * geometry_of(module).conv_groups
        sizes[names[id(module)]] = taken + arguments[0].numel(), given + output.numel(), patches

    handles = [module.register_forward_hook(hook) for module in layers.values()]
    try:
        model(image)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
