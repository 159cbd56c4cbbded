"""The methods, one paper a file. Importing this package fills the registry."""

from .alps import ALPS
from .base import REGISTRY, Method, Pruned, make, register
from .gblm import GBLM
from .magnitude import Magnitude
from .ria import RIA
from .sparsegpt import SparseGPT
from .taylor import Taylor
from .wanda import Wanda


__all__ = [
    "ALPS",
    "GBLM",
    "REGISTRY",
    "RIA",
    "Magnitude",
    "Method",
    "Pruned",
    "SparseGPT",
    "Taylor",
    "Wanda",
    "make",
    "register",
]
