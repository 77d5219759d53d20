"""What the forms cost on one side of a layer: in which form to keep the factor, and to keep and apply its inverse.

Each form counts its FLOPs in its own file; the rates of the device turn them into seconds (see ``rates``).
"""

from dataclasses import dataclass

from kfac_sua.preconditioner.forms.correlations import can_correlate
from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.inverse import ComputedInverse, Inverse
from kfac_sua.preconditioner.forms.patch_rows import can_be_patch_rows, product_width
from kfac_sua.preconditioner.forms.patches import PatchInverse
from kfac_sua.preconditioner.forms.rates import CPU, DeviceRates, Flops
from kfac_sua.preconditioner.forms.rows import LowRankInverse
from kfac_sua.preconditioner.forms.split import PART_BYTES, SPLIT_OPERATIONS
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout, LayerGeometry
from kfac_sua.preconditioner.settings import InverseMethod, KroneckerSettings, Products, WeightSharing

MAX_KEPT_ROWS = 16384
"""Largest number of rows that the Woodbury identity may factorise: a matrix of 1 GiB in float32. ``auto`` forms wider
factors with more rows densely; under ``inverse_method=low_rank`` more rows are an error."""

ANY_ROWS = 2**62
"""Number of rows above that of every mini-batch: no limit."""

BACKWARD_OPERATIONS = 6
"""Additional operations of a side that is applied in the backward pass: the parts of the convolution's own backward
pass are called one by one, and channels are moved last and back."""

FLOAT_BYTES = 4
"""Bytes of a number that is split; splitting is for float32, as float64 would lose precision by it."""


@dataclass(frozen=True)
class Application:
    """How the vectors of one step are multiplied by an inverse, and how long that takes.

    Args:
        seconds: How long it takes.
        is_split: Whether the inverse is multiplied as bfloat16 parts.
    """

    seconds: float
    is_split: bool


@dataclass(frozen=True)
class SideCost:
    """Work on one side of one layer, over all of its blocks.

    Args:
        num_blocks: Blocks of the factor.
        width: Width d of a block.
        vectors: Vectors of width d that one application multiplies per block.
        inverse_period: Applications per refresh.
        correlated_taps: Vertical taps of the kernel, where statistics come from correlations between image lines, which
            divide the FLOPs of patches by that number (see ``correlations``); 1 elsewhere.
        patch_width: Width of the products between patches that are not formed (see ``patch_rows``); 0 where rows are
            not such patches.
        keeps_woodbury: Whether an inverse computed by the Woodbury identity is never made dense.
        products: Whether inverses are applied in bfloat16 parts (see ``split``): under ``auto`` where that is faster.
        rates: Those of the device.
    """

    num_blocks: int
    width: int
    vectors: int
    inverse_period: int
    correlated_taps: int = 1
    patch_width: int = 0
    keeps_woodbury: bool = False
    products: Products = Products.ieee
    rates: DeviceRates = CPU

    @classmethod
    def of_activation(
        cls, geometry: LayerGeometry, layout: BlockLayout, settings: KroneckerSettings, rates: DeviceRates = CPU
    ) -> "SideCost":
        """Return the work on the activation side: a vector per output channel and identity tap."""
        num_blocks, width = layout.activation_blocks
        # A sample of the rows is formed, so that neither correlations nor products with pixels are possible.
        is_whole = settings.weight_sharing is WeightSharing.expand and settings.activation_rows is None
        return cls(
            num_blocks,
            width,
            layout.gradient.num_channels * layout.identity_taps,
            settings.inverse_period,
            correlated_taps=geometry.kernel_size[0] if is_whole and can_correlate(geometry, layout) else 1,
            patch_width=product_width(geometry) if is_whole and can_be_patch_rows(geometry, layout) else 0,
            keeps_woodbury=settings.inverse_method is InverseMethod.low_rank,
            rates=rates,
        )

    @classmethod
    def of_gradient(cls, layout: BlockLayout, settings: KroneckerSettings, rates: DeviceRates = CPU) -> "SideCost":
        """Return the work on the gradient side: a vector per weight of an output channel."""
        num_blocks, width = layout.gradient_blocks
        vectors = layout.activation.num_channels * layout.num_taps + (layout.bias is BiasBlock.JOINT)
        keeps_woodbury = settings.inverse_method is InverseMethod.low_rank
        return cls(num_blocks, width, vectors, settings.inverse_period, keeps_woodbury=keeps_woodbury, rates=rates)

    # --- FLOPs of dense blocks --------------------------------------------------------------------------------------

    def dense_inverse(self) -> int:
        """FLOPs of inverting dense blocks."""
        return self.num_blocks * DenseInverse.inversion_flops(self.width).total

    def eigenbasis(self) -> int:
        """FLOPs of decomposing dense blocks."""
        return self.num_blocks * EigenBasis.decomposition_flops(self.width)

    def dense_apply(self) -> int:
        """FLOPs of one application of dense inverse blocks."""
        return self.num_blocks * DenseInverse.application_flops(self.width, self.vectors)

    def eigenbasis_apply(self) -> int:
        """FLOPs of one application in the eigenbasis."""
        return self.num_blocks * EigenBasis.application_flops(self.width, self.vectors)

    # --- seconds ----------------------------------------------------------------------------------------------------

    def dense_application(self) -> Application:
        """Return the cost of one application of dense inverse blocks."""
        return self._application(self.dense_apply(), self.num_blocks * self.vectors * self.width, num_products=1)

    def low_rank_application(self, rows: int) -> Application:
        """Return the cost of one application of roots with so many rows."""
        flops = self.num_blocks * LowRankInverse.application_flops(self.width, rows, self.vectors)
        return self._application(flops, self.num_blocks * self.vectors * (self.width + rows), num_products=2)

    def patches_application(self, rows: int, num_operations: int = 0) -> Application:
        """Return the cost of one application of an inverse kept as patches."""
        work = PatchInverse.application_flops(self.width, rows, self.vectors)
        seconds = work.seconds(self.rates) + num_operations * self.rates.kernel_s
        return Application(seconds, is_split=self.products is Products.bf16x3)

    def dense_total(self, rows: int) -> float:
        """Seconds of statistics, inverse and applications over one refresh period, if the factor is dense."""
        statistics = self.num_blocks * DenseFactor.moment_flops(self.width, rows) // self.correlated_taps
        work = Flops(products=statistics, inversions=self.dense_inverse())
        return work.seconds(self.rates) + self.inverse_period * self.dense_application().seconds

    def low_rank_total(self, rows: int) -> float:
        """Seconds of inverse and applications over one refresh period, if the factor is kept as rows.

        Statistics cost nothing more: they are the rows.
        """
        if self.patch_width:
            inversion = PatchInverse.inversion_flops(self.patch_width, rows).seconds(self.rates)
            as_computed = self.patches_application(rows)
        else:
            inversion = LowRankInverse.inversion_flops(self.width, rows).seconds(self.rates)
            as_computed = self.low_rank_application(rows)
        by_form = self._seconds_by_form(rows, as_computed, is_patches=bool(self.patch_width))
        return self.num_blocks * inversion + min(by_form.values())

    def most_low_rank_rows(self) -> int:
        """Return the largest number of rows for which the Woodbury identity takes less time than the dense inverse.

        The difference of the two totals changes sign at most once in ``[0, d]``, as the low-rank total grows faster;
        bisection finds where.
        """
        low, high = 0, self.width
        while low < high:
            middle = (low + high + 1) // 2
            if self.low_rank_total(middle) < self.dense_total(middle):
                low = middle
            else:
                high = middle - 1
        return low

    def max_kept_rows(self, settings: KroneckerSettings) -> int:
        """Return the number of rows up to which the factor is kept as rows, by ``settings.inverse_method``."""
        if settings.inverse_method is InverseMethod.low_rank:
            return ANY_ROWS
        dense_only = settings.inverse_method is InverseMethod.cholesky or settings.needs_dense_factors
        return 0 if dense_only else min(self.most_low_rank_rows(), MAX_KEPT_ROWS)

    # --- where an inverse is applied ------------------------------------------------------------------------------

    @property
    def backward_rows(self) -> float:
        """Rows of a mini-batch below which multiplying rows, in the backward pass, is faster than multiplying vectors.

        The FLOPs saved have to make up for :data:`BACKWARD_OPERATIONS` more launches, counted as in an eager step; in a
        captured step they take less.
        """
        rate = max(self.rates.product, self.rates.split_product)
        seconds_per_vector = 2 * self.num_blocks * self.width**2 / rate
        return self.vectors - BACKWARD_OPERATIONS * self.rates.launch_s / seconds_per_vector

    # --- the form that an inverse is kept in ------------------------------------------------------------------------

    def in_cheapest_form(self, inverse: ComputedInverse) -> Inverse:
        """Return the inverse in the form in which converting and applying it take least time until the next refresh."""
        if inverse.num_rows == 0:
            return inverse.split() if self.dense_application().is_split else inverse
        if isinstance(inverse, PatchInverse):
            is_patches, application = True, self.patches_application(inverse.num_rows, inverse.num_operations)
        else:
            is_patches, application = False, self.low_rank_application(inverse.num_rows)
        seconds = self._seconds_by_form(inverse.num_rows, application, is_patches=is_patches)
        best = min(seconds, key=lambda form: seconds[form])
        if best == "dense":
            dense = DenseInverse(inverse.dense())
            return dense.split() if self.dense_application().is_split else dense
        if best == "low rank":
            assert isinstance(inverse, PatchInverse)
            inverse, application = inverse.to_low_rank(), self.low_rank_application(inverse.num_rows)
        return inverse.split() if application.is_split else inverse

    def _seconds_by_form(self, rows: int, as_computed: Application, *, is_patches: bool) -> dict[str, float]:
        """Return the seconds per refresh period of each form that an inverse computed from rows may be kept in.

        By counted FLOPs it stays as computed: the factor was kept as rows because applying these takes fewest FLOPs.
        """
        seconds = {"as computed": self.inverse_period * as_computed.seconds}
        if self.keeps_woodbury or not self.rates.has_launches:
            return seconds
        root = self.num_blocks * Flops(solves=rows**2 * self.width).seconds(self.rates) if is_patches else 0.0
        product = self.num_blocks * Flops(products=2 * rows * self.width**2).seconds(self.rates)
        seconds["dense"] = root + product + self.inverse_period * self.dense_application().seconds
        if is_patches:
            seconds["low rank"] = root + self.inverse_period * self.low_rank_application(rows).seconds
        return seconds

    def _application(self, flops: int, numbers: int, num_products: int) -> Application:
        """Return the cost of products, in float32 or in bfloat16 parts: as :attr:`products` says, or the faster one.

        Args:
            flops: FLOPs of the products.
            numbers: Numbers of the vectors that would be split.
            num_products: Number of products.
        """
        rates = self.rates
        plain = flops / rates.product + num_products * rates.kernel_s
        split = flops / (rates.split_product or rates.product) + num_products * SPLIT_OPERATIONS * rates.kernel_s
        split += numbers * (FLOAT_BYTES + PART_BYTES) / rates.memory
        is_faster = self.products is Products.auto and rates.split_product > 0 and split < plain
        is_split = self.products is Products.bf16x3 or is_faster
        return Application(split if is_split else plain, is_split)
