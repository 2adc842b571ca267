"""The reference: one ESAM step in NumPy, slow and literal, and a model to run it with."""

from esam_core.reference.network import Evaluation, Model, Network
from esam_core.reference.optimizers import BaseOptimizer
from esam_core.reference.step import Step

__all__ = ["BaseOptimizer", "Evaluation", "Model", "Network", "Step"]
