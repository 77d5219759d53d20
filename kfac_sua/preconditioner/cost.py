"""Counted FLOPs of inverting and applying a factor; a multiply-add counts as two."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SideCost:
    """Work on one side of one layer.

    Args:
        num_blocks: Blocks of the factor.
        width: Width d of a block.
        vectors: Vectors of width d that one application multiplies per block.
        inverse_period: Applications per refresh.
        correlated_rows: Kernel rows, where statistics come from correlations between image rows: these save all but
            one of them (see ``correlations``).
        patch_width: Width of the products between patches that are never formed (see ``patch_rows``): channels, or all
            features where strides leave fewer patches than pixels; 0 where rows are no such patches.
    """

    num_blocks: int
    width: int
    vectors: int
    inverse_period: int
    correlated_rows: int = 1
    patch_width: int = 0

    def dense_inverse(self) -> int:
        """Cholesky factorisation (d³/3) and inverse from it (2 d³/3), all blocks."""
        return self.num_blocks * self.width**3

    def eigenbasis(self) -> int:
        """Eigendecomposition with vectors, about 9 d³ (Golub & Van Loan, symmetric QR), all blocks."""
        return 9 * self.num_blocks * self.width**3

    def dense_apply(self) -> int:
        """One application of dense inverse blocks."""
        return 2 * self.num_blocks * self.vectors * self.width**2

    def statistics(self, rows: int) -> int:
        """Dense blocks from rows."""
        return 2 * self.num_blocks * rows * self.width**2 // self.correlated_rows

    def low_rank_inverse(self, rows: int) -> int:
        """Gram matrix and its Cholesky factorisation, and the triangular solve unless rows are patches, all blocks."""
        factorisation = rows**3 // 3
        if self.patch_width:
            return self.num_blocks * (2 * rows**2 * self.patch_width + factorisation)
        return self.num_blocks * (2 * rows**2 * self.width + factorisation + rows**2 * self.width)

    def low_rank_apply(self, rows: int) -> int:
        """One application of the Woodbury form; for patches, of taps that all read a pixel."""
        solve = 2 * rows**2 if self.patch_width else 0
        return self.num_blocks * self.vectors * (4 * self.width * rows + solve)

    def dense_total(self, rows: int) -> int:
        """Statistics, inverse and applications over one refresh period."""
        return self.statistics(rows) + self.dense_inverse() + self.inverse_period * self.dense_apply()

    def low_rank_total(self, rows: int) -> int:
        """Inverse and applications over one refresh period; the rows themselves are the statistics."""
        return self.low_rank_inverse(rows) + self.inverse_period * self.low_rank_apply(rows)

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
