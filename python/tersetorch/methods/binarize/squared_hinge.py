"""The loss of the binary networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.methods.arguments import check_floating


def squared_hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples and classes of max(0, 1 - t * score)^2, t = +1 for the sample's class and -1 for the others.

    Args:
        scores: floating-point [samples, classes].
        labels: int64 [samples], each in [0, classes).

    Raises:
        TypeError: scores is no floating-point tensor, or labels no int64 one.
        ValueError: the shapes do not fit, or labels on the CPU are out of range.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), section 3.1 (an L2-SVM output layer).
    """
    check_floating("squared_hinge", "scores", scores)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"squared_hinge: labels must be an int64 tensor, got {kind}; convert it")
    if scores.dim() != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            "squared_hinge: scores must be [samples, classes] and labels [samples], got shapes "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}; reshape them"
        )
    classes = scores.shape[1]
    try:
        chosen = functional.one_hot(labels, classes)
    except RuntimeError as error:
        outside = labels[(labels < 0) | (labels >= classes)]
        if not outside.numel():
            raise
        raise ValueError(
            f"squared_hinge: labels must lie in [0, {classes}), got {int(outside[0])}; leave such samples out, or give "
            "scores for all classes"
        ) from error
    wanted = 2.0 * chosen.to(scores.dtype) - 1.0
    return torch.relu(1 - wanted * scores).square().mean()
