"""hf_prune: prune language models of Hugging Face Transformers. Importing it gives every `PreTrainedModel` its `prune()`."""

import importlib

from .blocks import Decoder, Linear
from .calibration import calibration_sequences
from .config import PruningConfig
from .conversion import expand
from .distillation import Distillation
from .evaluation import Perplexity, perplexity
from .iterative import prune_iteratively
from .masks import Masks
from .methods import ALPS, GBLM, RIA, Magnitude, Method, SparseGPT, Wanda, register
from .mixin import PruningMixin, install, reconstruct
from .patterns import NM, Unstructured
from .pruning import prune_model
from .reconstruction import Reconstruction
from .report import PruningReport
from .self_calibration import self_calibration_sequences
from .serialization import load
from .streaming import prune_checkpoint
from .sweep import sweep_learning_rate


__version__ = "0.1.0.dev0"

__all__ = [
    "ALPS", "GBLM", "KeepMasksCallback", "NM", "PERPCallback", "RIA", "Decoder", "Distillation", "Linear", "Magnitude", "Masks", "Method",
    "EfficientLLMCallback", "Perplexity", "PruningConfig", "PruningMixin", "PruningReport", "Reconstruction", "SparseGPT", "Unstructured", "Wanda",
    "calibration_sequences", "expand", "install", "load", "perplexity", "prune_checkpoint", "prune_iteratively", "prune_model", "reconstruct", "register",
    "self_calibration_sequences", "sweep_learning_rate", "ExportReport", "check_zeros", "export", "load_exported", "quantise", "advise", "to_dense", "to_semi_structured",
]  # fmt: skip

install()

_LATER = {  # name -> module that takes seconds to import, or needs more than hf_prune installs
    "EfficientLLMCallback": "pretraining", "KeepMasksCallback": "callbacks", "PERPCallback": "callbacks",
    "ExportReport": "runtimes.exporting", "export": "runtimes.exporting", "load_exported": "runtimes.exported",
    "check_zeros": "runtimes.quantised", "quantise": "runtimes.quantised", "advise": "runtimes.advise",
    "to_dense": "runtimes.semi_structured", "to_semi_structured": "runtimes.semi_structured",
}  # fmt: skip


_MODULES = ("callbacks", "metric", "peft_adapters", "pretraining", "runtimes")


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LATER:
        return getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
