"""Terms of a loss: what a recipe may ask for. The modules are built in `segpipe.training.losses`."""

from __future__ import annotations

from enum import Enum

from pydantic import Field, NonNegativeFloat, model_validator

from segpipe.config.types import Strict

IGNORE = -1
"""Target value of an element that takes no part: no data, or not labelled."""


class LossName(str, Enum):
    """What is minimised; p is the softmax (one channel: the sigmoid), t the true class of an element.

    Losses of elements, averaged over them:

    - ``cross_entropy``: −log p_t. With `class_weights` w: Σ w_t·(−log p_t) / Σ w_t, as torch.
    - ``focal``: (1 − p_t)^γ·(−log p_t), averaged in the same way (Lin et al. 2017, arXiv:1708.02002).
    - ``border``: (w_t + map)·(−log p_t), for touching objects (Ronneberger et al. 2015,
      arXiv:1505.04597, eq. 1 and 2, over the number of elements); the map is `border.border_weights`.
    - ``bce``: binary cross-entropy of each class against the rest, on sigmoids of the channels.

    Losses of regions, averaged over classes; tp, fp and fn are sums of p:

    - ``dice``: 1 − (2tp + s) / (2tp + fp + fn + s) (Milletari et al. 2016, arXiv:1606.04797).
    - ``jaccard``: 1 − (2tp + s) / (2(tp + fp + fn) + s).
    - ``tversky``: 1 − (tp + s) / (tp + α·fp + β·fn + s) (Salehi et al. 2017, arXiv:1706.05721).
    - ``lovasz``: the convex surrogate of 1 − Jaccard (Berman et al. 2018, arXiv:1705.08790), over the
      whole batch: Lovász-softmax of the classes present, background included; one channel: Lovász hinge.
    """

    cross_entropy = "cross_entropy"
    focal = "focal"
    dice = "dice"
    jaccard = "jaccard"
    tversky = "tversky"
    lovasz = "lovasz"
    bce = "bce"
    border = "border"


_OVERLAP = ("smooth", "batch", "background")


TAKES: dict[LossName, tuple[str, ...]] = {
    LossName.cross_entropy: ("class_weights",),
    LossName.focal: ("class_weights", "gamma"),
    LossName.border: ("class_weights",),
    LossName.bce: (),
    LossName.dice: _OVERLAP,
    LossName.jaccard: _OVERLAP,
    LossName.tversky: ("alpha", "beta", *_OVERLAP),
    LossName.lovasz: (),
}
"""Fields that a loss uses beside `weight`."""


class LossTerm(Strict):
    """One term of a loss. BCE + Dice is two of them."""

    name: LossName = Field(description="cross_entropy, focal, dice, jaccard, tversky, lovasz, bce or border.")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="Factor of this term in the sum.")
    class_weights: list[NonNegativeFloat] = Field(
        [],
        description="cross_entropy, focal, border: a weight for each class, background first. Empty: all 1.",
    )
    gamma: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="focal: how much less easy elements count; 0: no less."
    )
    alpha: float = Field(0.3, ge=0, allow_inf_nan=False, description="tversky: weight of false positives.")
    beta: float = Field(0.7, ge=0, allow_inf_nan=False, description="tversky: weight of false negatives.")
    smooth: float = Field(
        1e-5,
        gt=0,
        allow_inf_nan=False,
        description="dice, jaccard, tversky: s of the formulas, in elements, above and below the line "
        "(MONAI's smooth_nr and smooth_dr). A class that is absent and not predicted has loss 0.",
    )
    batch: bool = Field(
        True,
        description="dice, jaccard, tversky: one ratio over the batch; false: the mean over its samples.",
    )
    background: bool = Field(
        False, description="dice, jaccard, tversky: channel 0 counts as a class of its own."
    )

    @model_validator(mode="after")
    def _only_what_the_loss_uses(self) -> LossTerm:
        """A field at its default is not one that was asked for: forms send all of them."""
        takes = ("weight", *TAKES[self.name])
        fields = {field for fields in TAKES.values() for field in fields}
        default = {field: LossTerm.model_fields[field].get_default() for field in fields}
        extra = sorted(field for field in fields.difference(takes) if getattr(self, field) != default[field])
        if extra:
            raise ValueError(f"{self.name.value} takes no {', '.join(extra)}; it takes {', '.join(takes)}")
        if any(weight == float("inf") for weight in self.class_weights):
            raise ValueError(f"class_weights: found {self.class_weights}; finite numbers, 0 or more")
        if self.class_weights and not any(self.class_weights):
            raise ValueError("class_weights: all are 0, so nothing is learned; at least one above 0")
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0, so no error counts; at least one above 0")
        return self
