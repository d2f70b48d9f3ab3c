"""Which weights go: each method sets masks that training respects until finalize bakes them in."""

from tersetorch.methods.prune.adopt import from_torch, keep_zeros
from tersetorch.methods.prune.batch_norm import recalibrate_batch_norm
from tersetorch.methods.prune.dead_neurons import remove_dead_neurons
from tersetorch.methods.prune.density import LayerDensity, density
from tersetorch.methods.prune.dropout import dropout_rate, rescale_dropout
from tersetorch.methods.prune.gradual import GradualPruner
from tersetorch.methods.prune.iterative import iterative
from tersetorch.methods.prune.magnitude import magnitude
from tersetorch.methods.prune.obd import Deletion, Saliencies, obd, saliencies
from tersetorch.methods.prune.obs import LayerError, Solver, obs
from tersetorch.methods.prune.only import only
from tersetorch.methods.prune.optimal_brain_surgeon import DeletedWeight
from tersetorch.methods.prune.second_derivatives import diagonal_hessian
from tersetorch.methods.prune.sensitivity import Sensitivity, sensitivity
from tersetorch.methods.prune.surgery import DynamicSurgery

__all__ = [
    "DeletedWeight",
    "Deletion",
    "DynamicSurgery",
    "GradualPruner",
    "LayerDensity",
    "LayerError",
    "Saliencies",
    "Sensitivity",
    "Solver",
    "density",
    "diagonal_hessian",
    "dropout_rate",
    "from_torch",
    "iterative",
    "keep_zeros",
    "magnitude",
    "obd",
    "obs",
    "only",
    "recalibrate_batch_norm",
    "remove_dead_neurons",
    "rescale_dropout",
    "saliencies",
    "sensitivity",
]
