"""Taylor: whole heads, channels and width by what the loss says they are worth. LLM-Pruner (arXiv 2305.11627, equation 5)."""

from dataclasses import dataclass, field

from ..patterns import check_flag
from .base import Method, register


@register
@dataclass(frozen=True)
class Taylor(Method):
    """Groups go by |w g| (order 1) or |w g - g^2 w^2 / 2| (order 2), summed over each, for patterns such as "heads:0.25,ffn:0.25".

    Attributes:
        order: of the expansion.
        compensate: readers are refitted to what is left, by least squares on the calibration data.
        kinds: that may go with `parameters=`; None are all that the model can lose. On SmolLM2-135M at 0.7 FFN
            channels alone gave a perplexity of 77, all kinds 313, both compensated.
        together: kind -> how many go at a time, so that the multiples that kernels like, and N:M, last; 1 if not named.
        per_parameter: kinds of groups compare by saliency per parameter (with `parameters=`).
    """

    order: int = 2
    compensate: bool = True
    kinds: tuple[str, ...] | None = ("ffn",)
    per_parameter: bool = True
    together: dict[str, int] = field(default_factory=lambda: {"ffn": 8, "hidden": 8})

    name = "taylor"
    paper = "arXiv 2305.11627"
    structural = True

    def __post_init__(self):
        check_flag("compensate of taylor", self.compensate)
        check_flag("per_parameter of taylor", self.per_parameter)
