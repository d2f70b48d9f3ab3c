"""Ends compression in training: parametrizations become plain tensors."""

from __future__ import annotations

import torch
from torch import nn

from tersetorch.formats.vector_codes import VectorCodes, note_codes
from tersetorch.methods.arguments import check_model
from tersetorch.methods.parametrization import CompressedWeight, bake, detach, live_weights, unshare
from tersetorch.methods.quantize.fixed_point import release


def finalize(model: nn.Module) -> nn.Module:
    """Bakes the compressed weights of model into plain parameters, in place, and returns model.

    Outputs stay the same to the bit. Each weight is the same Parameter object as before the first method was called,
    at its old place among the module's parameters, so an optimizer that was built before goes on with it; it requires
    gradients as it did. Tied weights stay tied, deep copies of the model stay as they are, and a model with nothing to
    bake is returned unchanged. The model then pickles and loads plain checkpoints.

    The masks end here: zeros are zeros like any other, and training goes on from them as from any other value. To
    train at fixed sparsity, finalize afterwards, or convert to SparseLinear layers.

    Weights that tt.binarize made signs become those signs, stochastic ones the real values that they are evaluated
    with. Weights in fixed point stay the numbers that they are; activations are no longer rounded, but their formats
    are left for tt.convert(model, plan="fixed").

    Where rows are sums of shared ones, as tt.quantize.residual makes them, the module keeps their codes beside the
    weight, outside the state dict: tt.save and tt.convert use them as long as the weight is not changed.

    Where other parametrizations were registered on top of ours, only ours is baked in, and they stay.

    Raises:
        TypeError: model is no module.
    """
    check_model("finalize", model)
    live = live_weights(model)
    with torch.no_grad():
        for weight in live:
            weight.original.copy_(weight.compressed(weight.original))
            note_codes(weight.module, weight.tensor, _codes_of_sums(weight.compressed))
    for weight in reversed(live):
        # Before detach, which may leave the list without our parametrization.
        unshare(weight)
        detach(weight)
    release(model)
    bake(model)
    return model


def _codes_of_sums(compressed: CompressedWeight) -> VectorCodes | None:
    """Codes and codebooks whose sums a weight is; None for other weights, whose numbers say enough."""
    codes, codebook = compressed.codes, compressed.codebook
    if codes is None or codebook is None or codebook.dim() != 4 or codebook.shape[0] == 1:
        return None
    return VectorCodes(codes, codebook.detach())
