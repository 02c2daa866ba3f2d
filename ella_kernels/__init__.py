"""The ELLA penalty and its gradients from LoRA factors, without forming a weight-sized matrix.

>>> import torch, ella_kernels as ek
>>> past = ek.truncate(torch.randn(6, 4), torch.randn(4, 5), rank=2)
>>> A, B = torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
>>> penalty = ek.hadamard_penalty(A, B, past, scaling=2.0)
>>> penalty.backward()
>>> A.grad.shape
torch.Size([2, 5])
"""

from . import reference
from .dispatch import select_algorithm
from .functional import (
    add_hadamard_grad_,
    add_spectral_grad_,
    hadamard_penalty,
    hadamard_penalty_grouped,
    spectral_penalty,
    spectral_penalty_grouped,
)
from .lowrank import LowRank, truncate
from .plan import Plan

__version__ = "0.1.0"

__all__ = [
    "LowRank",
    "Plan",
    "add_hadamard_grad_",
    "add_spectral_grad_",
    "hadamard_penalty",
    "hadamard_penalty_grouped",
    "reference",
    "select_algorithm",
    "spectral_penalty",
    "spectral_penalty_grouped",
    "truncate",
]
