"""Name and look of each method that is compared, the same in every figure, table and report."""

import dataclasses

Dashes = str | tuple[float, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class MethodStyle:
    """What a method is called, and how its curves are drawn.

    Attributes:
        label: Name in legends and tables.
        color: Hexadecimal RGB from a palette that colour-blind readers tell apart.
        linestyle: Dash pattern in matplotlib's notation, so that curves differ in grey print.
        marker: Marker in matplotlib's notation, for the same reason.
        prose: Name within a sentence, where the label does not read well; empty if it does.
    """

    label: str
    color: str
    linestyle: Dashes
    marker: str
    prose: str = ""

    @property
    def name(self) -> str:
        """Name within a sentence."""
        return self.prose or self.label


# The method with which all others are compared.
BASELINE = "baseline"

# Keyed by the name of the method, in the order of the legend: the paper's five curves (named as their preconditioner),
# then the comparators. Colours of Okabe and Ito (2008), without their yellow, which is too light for a line.
METHODS = {
    BASELINE: MethodStyle("Batch-norm baseline", "#000000", "-", "o", "baseline"),
    "kfac": MethodStyle("K-FAC", "#0072B2", (0, (5, 1.5)), "s"),
    "grouped": MethodStyle("K-FAC, groups", "#009E73", (0, (5, 1.5, 1, 1.5)), "^", "K-FAC in groups"),
    "sua": MethodStyle("SUA", "#D55E00", (0, (7, 1.2, 1, 1.2, 1, 1.2)), "D"),
    "sua_grouped": MethodStyle("SUA, groups", "#CC79A7", (0, (1.5, 1)), "v", "SUA in groups"),
    "adamw": MethodStyle("AdamW", "#E69F00", (0, (9, 2)), "P"),
    "muon": MethodStyle("Muon", "#56B4E9", (0, (3, 1.2)), ">"),
    "sgd_no_bn": MethodStyle("SGD without batch norm", "#7F7F7F", (0, (1, 2.2)), "<"),
}
