"""The loss of the binary networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def squared_hinge(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples and classes of max(0, 1 - t * score)^2, t = +1 for the sample's class and -1 for the others.

    Args:
        scores: floating-point [samples, classes].
        labels: int64 [samples], each in [0, classes).

    Raises:
        ValueError: the shapes do not fit.

    Source:
        Courbariaux, Bengio, David, BinaryConnect (2015), section 3.1 (an L2-SVM output layer).
    """
    if scores.dim() != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(
            "squared_hinge: scores must be [samples, classes] and labels [samples], got shapes "
            f"{tuple(scores.shape)} and {tuple(labels.shape)}; reshape them"
        )
    wanted = 2.0 * functional.one_hot(labels, scores.shape[1]).to(scores.dtype) - 1.0
    return torch.relu(1 - wanted * scores).square().mean()
