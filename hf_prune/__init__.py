"""hf_prune: prune language models of Hugging Face Transformers. Importing it gives every `PreTrainedModel` its `prune()`."""

from .blocks import Decoder, Linear
from .calibration import calibration_sequences
from .config import PruningConfig
from .conversion import expand
from .distillation import Distillation
from .evaluation import Perplexity, perplexity
from .iterative import prune_iteratively
from .masks import Masks
from .methods import GBLM, RIA, Magnitude, Method, SparseGPT, Wanda, register
from .mixin import PruningMixin, install, reconstruct
from .patterns import NM, Unstructured
from .pruning import prune_model
from .reconstruction import Reconstruction
from .report import PruningReport
from .serialization import load
from .sweep import sweep_learning_rate


__version__ = "0.1.0.dev0"

__all__ = [
    "GBLM", "KeepMasksCallback", "NM", "PERPCallback", "RIA", "Decoder", "Distillation", "Linear", "Magnitude", "Masks", "Method",
    "EfficientLLMCallback", "Perplexity", "PruningConfig", "PruningMixin", "PruningReport", "Reconstruction", "SparseGPT", "Unstructured", "Wanda",
    "calibration_sequences", "expand", "install", "load", "perplexity", "prune_iteratively", "prune_model", "reconstruct", "register",
    "advise", "sweep_learning_rate", "to_dense", "to_semi_structured",
]  # fmt: skip

install()


def __getattr__(name: str):
    if name in ("KeepMasksCallback", "PERPCallback"):  # Trainer's modules take seconds to import
        from . import callbacks

        return getattr(callbacks, name)
    if name == "EfficientLLMCallback":
        from .pretraining import EfficientLLMCallback

        return EfficientLLMCallback
    if name == "advise":
        from .export.advise import advise

        return advise
    if name in ("to_semi_structured", "to_dense"):  # needs Triton
        from .export import semi_structured

        return getattr(semi_structured, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
