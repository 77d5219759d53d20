"""What the forms cost on one side of a layer, in counted FLOPs, and up to how many rows rows are cheaper.

A multiply-add counts as two. What each form costs per block stands in its file.
"""

from dataclasses import dataclass

from kfac_sua.preconditioner.forms.correlations import can_correlate
from kfac_sua.preconditioner.forms.dense import DenseFactor, DenseInverse
from kfac_sua.preconditioner.forms.eigen import EigenBasis
from kfac_sua.preconditioner.forms.patch_rows import can_be_patch_rows, product_width
from kfac_sua.preconditioner.forms.patches import PatchInverse
from kfac_sua.preconditioner.forms.rows import LowRankInverse
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout, LayerGeometry
from kfac_sua.preconditioner.settings import InverseMethod, KroneckerSettings, WeightSharing

ANY_ROWS = 2**62
"""A number of rows that no mini-batch has."""


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
    """

    num_blocks: int
    width: int
    vectors: int
    inverse_period: int
    correlated_rows: int = 1
    patch_width: int = 0

    @classmethod
    def of_activation(cls, geometry: LayerGeometry, layout: BlockLayout, settings: KroneckerSettings) -> "SideCost":
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
        )

    @classmethod
    def of_gradient(cls, layout: BlockLayout, settings: KroneckerSettings) -> "SideCost":
        """Return the work on the gradient side: a vector per weight that an output channel has."""
        num_blocks, width = layout.gradient_blocks
        vectors = layout.activation.num_channels * layout.num_taps + (layout.bias is BiasBlock.JOINT)
        return cls(num_blocks, width, vectors, settings.inverse_period)

    def dense_inverse(self) -> int:
        """FLOPs of inverting dense blocks."""
        return self.num_blocks * DenseInverse.inversion_flops(self.width)

    def eigenbasis(self) -> int:
        """FLOPs of decomposing dense blocks."""
        return self.num_blocks * EigenBasis.decomposition_flops(self.width)

    def dense_apply(self) -> int:
        """FLOPs of one application of dense inverse blocks."""
        return self.num_blocks * DenseInverse.application_flops(self.width, self.vectors)

    def eigenbasis_apply(self) -> int:
        """FLOPs of one application in the eigenbasis."""
        return self.num_blocks * EigenBasis.application_flops(self.width, self.vectors)

    def dense_total(self, rows: int) -> int:
        """FLOPs of statistics, inverse and applications over one refresh period, if dense."""
        statistics = self.num_blocks * DenseFactor.moment_flops(self.width, rows) // self.correlated_rows
        return statistics + self.dense_inverse() + self.inverse_period * self.dense_apply()

    def low_rank_total(self, rows: int) -> int:
        """FLOPs of inverse and applications over one refresh period, if rows, which are the statistics themselves."""
        if self.patch_width:
            inversion = PatchInverse.inversion_flops(self.patch_width, rows)
            application = PatchInverse.application_flops(self.width, rows, self.vectors)
        else:
            inversion = LowRankInverse.inversion_flops(self.width, rows)
            application = LowRankInverse.application_flops(self.width, rows, self.vectors)
        return self.num_blocks * (inversion + self.inverse_period * application)

    def most_low_rank_rows(self) -> int:
        """Return the largest number of rows for which the Woodbury form needs fewer FLOPs than the dense inverse.

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
