"""What the forms cost on one side of a layer: which factor to keep, and in which form to keep and apply its inverse.

FLOPs are counted, and take what the rates of the device say (see ``rates``). What each form counts stands in its file.
"""

from dataclasses import dataclass

from kfac_sua.preconditioner.forms.correlations import can_correlate
from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.form import Inverse, MadeInverse
from kfac_sua.preconditioner.forms.patch_rows import can_be_patch_rows, product_width
from kfac_sua.preconditioner.forms.patches import PatchInverse
from kfac_sua.preconditioner.forms.rates import CPU, DeviceRates, Flops
from kfac_sua.preconditioner.forms.rows import LowRankInverse
from kfac_sua.preconditioner.forms.split import PART_BYTES, SPLIT_OPERATIONS
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout, LayerGeometry
from kfac_sua.preconditioner.settings import InverseMethod, KroneckerSettings, Products, WeightSharing

ANY_ROWS = 2**62
"""A number of rows that no mini-batch has."""

BACKWARD_OPERATIONS = 6
"""Operations more that a side takes in the backward pass: the parts of a convolution's backward pass are called one by
one, and channels are brought last and back."""

FLOAT_BYTES = 4
"""Of the numbers that are split; in float64 splitting is no gain, and not asked for."""


@dataclass(frozen=True)
class Application:
    """What multiplying the vectors of one step takes, and how.

    Args:
        seconds: How long it takes.
        is_split: Whether as products of bfloat16 parts.
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
        correlated_rows: Kernel rows, where statistics come from correlations between image rows: these save all but
            one of them (see ``correlations``).
        patch_width: Width of the products between patches that are never formed (see ``patch_rows``); 0 where rows are
            no such patches.
        keeps_woodbury: Whether what the Woodbury identity gives is never made dense.
        products: Whether inverses are applied in bfloat16 parts (see ``split``): ``auto`` is where that is faster.
        rates: Those of the device.
    """

    num_blocks: int
    width: int
    vectors: int
    inverse_period: int
    correlated_rows: int = 1
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
        # A sample of the rows is formed, and multiplied as it is.
        is_whole = settings.weight_sharing is WeightSharing.expand and settings.activation_rows is None
        return cls(
            num_blocks,
            width,
            layout.gradient.num_channels * layout.identity_taps,
            settings.inverse_period,
            correlated_rows=geometry.kernel_size[0] if is_whole and can_correlate(geometry, layout) else 1,
            patch_width=product_width(geometry) if is_whole and can_be_patch_rows(geometry, layout) else 0,
            keeps_woodbury=settings.inverse_method is InverseMethod.low_rank,
            rates=rates,
        )

    @classmethod
    def of_gradient(cls, layout: BlockLayout, settings: KroneckerSettings, rates: DeviceRates = CPU) -> "SideCost":
        """Return the work on the gradient side: a vector per weight that an output channel has."""
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
        """Return what one application of dense inverse blocks takes."""
        return self._application(self.dense_apply(), self.num_blocks * self.vectors * self.width, num_products=1)

    def low_rank_application(self, rows: int) -> Application:
        """Return what one application of roots of so many rows takes."""
        flops = self.num_blocks * LowRankInverse.application_flops(self.width, rows, self.vectors)
        return self._application(flops, self.num_blocks * self.vectors * (self.width + rows), num_products=2)

    def patches_application(self, rows: int, num_operations: int = 0) -> Application:
        """Return what one application of patches takes."""
        work = PatchInverse.application_flops(self.width, rows, self.vectors)
        seconds = work.seconds(self.rates) + num_operations * self.rates.kernel_s
        return Application(seconds, is_split=self.products is Products.bf16x3)

    def dense_total(self, rows: int) -> float:
        """Seconds of statistics, inverse and applications over one refresh period, if dense."""
        statistics = self.num_blocks * DenseFactor.moment_flops(self.width, rows) // self.correlated_rows
        work = Flops(products=statistics, inversions=self.dense_inverse())
        return work.seconds(self.rates) + self.inverse_period * self.dense_application().seconds

    def low_rank_total(self, rows: int) -> float:
        """Seconds of inverse and applications over one refresh period, if rows, which are the statistics themselves."""
        if self.patch_width:
            making = PatchInverse.inversion_flops(self.patch_width, rows).seconds(self.rates)
            as_made = self.patches_application(rows)
        else:
            making = LowRankInverse.inversion_flops(self.width, rows).seconds(self.rates)
            as_made = self.low_rank_application(rows)
        return self.num_blocks * making + min(self._ways(rows, as_made, is_patches=bool(self.patch_width)).values())

    def most_low_rank_rows(self) -> int:
        """Return the largest number of rows for which the Woodbury identity takes less time than the dense inverse.

        The difference of the two totals changes sign at most once in ``[0, d]`` (the low-rank total grows faster), so
        bisection finds it.
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
        """Return up to how many rows the factor is kept as rows, by ``settings.inverse_method``."""
        if settings.inverse_method is InverseMethod.low_rank:
            return ANY_ROWS
        dense_only = settings.inverse_method is InverseMethod.cholesky or settings.needs_dense_factors
        return 0 if dense_only else self.most_low_rank_rows()

    # --- where an inverse is applied ------------------------------------------------------------------------------

    @property
    def backward_rows(self) -> float:
        """Rows of the mini-batch below which multiplying these in the backward pass takes less time than the vectors.

        What it saves has to make up for more launches; those of an eager step, as a captured one's take less.
        """
        rate = max(self.rates.product, self.rates.split_product)
        seconds_per_vector = 2 * self.num_blocks * self.width**2 / rate
        return self.vectors - BACKWARD_OPERATIONS * self.rates.launch_s / seconds_per_vector

    # --- the form that an inverse is kept in ------------------------------------------------------------------------

    def kept(self, made: MadeInverse) -> Inverse:
        """Return an inverse in the form in which making and applying it take least time until the next refresh."""
        if made.num_rows == 0:
            return made.split() if self.dense_application().is_split else made
        if isinstance(made, PatchInverse):
            is_patches, as_made = True, self.patches_application(made.num_rows, made.num_operations)
        else:
            is_patches, as_made = False, self.low_rank_application(made.num_rows)
        seconds = self._ways(made.num_rows, as_made, is_patches=is_patches)
        best = min(seconds, key=lambda form: seconds[form])
        if best == "dense":
            dense = DenseInverse(made.dense())
            return dense.split() if self.dense_application().is_split else dense
        if best == "low rank":
            assert isinstance(made, PatchInverse)
            made, as_made = made.with_root(), self.low_rank_application(made.num_rows)
        return made.split() if as_made.is_split else made

    def _ways(self, rows: int, as_made: Application, *, is_patches: bool) -> dict[str, float]:
        """Return the seconds per refresh period of each form that what rows give may be kept in, as made or another.

        Where counted FLOPs decide, a factor is kept as rows because these are applied as such in fewest.
        """
        ways = {"as made": self.inverse_period * as_made.seconds}
        if self.keeps_woodbury or not self.rates.has_launches:
            return ways
        root = self.num_blocks * Flops(solves=rows**2 * self.width).seconds(self.rates) if is_patches else 0.0
        product = self.num_blocks * Flops(products=2 * rows * self.width**2).seconds(self.rates)
        ways["dense"] = root + product + self.inverse_period * self.dense_application().seconds
        if is_patches:
            ways["low rank"] = root + self.inverse_period * self.low_rank_application(rows).seconds
        return ways

    def _application(self, flops: int, numbers: int, num_products: int) -> Application:
        """Return what products take in the faster of both ways, or in the one that is asked for.

        Args:
            flops: Their FLOPs.
            numbers: What is multiplied: numbers to be split.
            num_products: Operations.
        """
        rates = self.rates
        plain = flops / rates.product + num_products * rates.kernel_s
        split = flops / (rates.split_product or rates.product) + num_products * SPLIT_OPERATIONS * rates.kernel_s
        split += numbers * (FLOAT_BYTES + PART_BYTES) / rates.memory
        is_faster = self.products is Products.auto and rates.split_product > 0 and split < plain
        is_split = self.products is Products.bf16x3 or is_faster
        return Application(split if is_split else plain, is_split)
