"""hf_prune: prune language models of Hugging Face Transformers. Importing it gives every `PreTrainedModel` its `prune()`."""

from .blocks import Decoder, Linear
from .calibration import calibration_sequences
from .config import PruningConfig
from .conversion import expand
from .evaluation import Perplexity, perplexity
from .masks import Masks
from .methods import GBLM, RIA, Magnitude, Method, SparseGPT, Wanda, register
from .mixin import PruningMixin, install
from .patterns import NM, Unstructured
from .pruning import prune_model
from .report import PruningReport
from .serialization import load


__version__ = "0.1.0.dev0"

__all__ = [
    "GBLM", "KeepMasksCallback", "NM", "RIA", "Decoder", "Linear", "Magnitude", "Masks", "Method", "Perplexity", "PruningConfig", "PruningMixin",
    "PruningReport", "SparseGPT", "Unstructured", "Wanda", "calibration_sequences", "expand", "install", "load", "perplexity", "prune_model",
    "register",
]  # fmt: skip

install()


def __getattr__(name: str):
    if name == "KeepMasksCallback":  # Trainer's modules take seconds to import
        from .callbacks import KeepMasksCallback

        return KeepMasksCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
