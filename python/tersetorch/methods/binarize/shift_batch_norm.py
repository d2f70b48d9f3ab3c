"""Batch normalisation by shifts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tersetorch.methods.binarize.signs import ap2


class _ShiftBatchNorm(nn.modules.batchnorm._BatchNorm):
    """y = ap2(gamma) * C * ap2(1 / sqrt(var + eps)) + beta, C = x - mean and var = mean(C * ap2(C)).

    Every product is one with a power of two: a shift. In training mean and var are those of the batch, and running
    averages of both are kept, which evaluation takes; momentum, affine and track_running_stats are nn.BatchNorm's, and
    so are the names in the state dict. Gradients pass ap2 as if it were not there, where the authors' code takes the
    shifted numbers in the backward formula too; and the variance is averaged, where it keeps an inverse deviation.

    Raises:
        ValueError: input has other dimensions or channels, or, where mean and var are the batch's, fewer than two
            values a channel.

    Source:
        Hubara et al., Binarized Neural Networks (2016), algorithm 3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Of input's shape and dtype."""
        self._check_input_dim(input)
        self._check_channels(input)
        dims = [0, *range(2, input.dim())]
        if self.training or self.running_mean is None or self.running_var is None:
            self._check_values(input)
            mean = input.mean(dims)
            centred = input - self._by_channel(mean, input)
            var = (centred * ap2(centred)).mean(dims)
            if self.training and self.running_mean is not None and self.running_var is not None:
                self._track(mean, var)
        else:
            mean, var = self.running_mean, self.running_var
            centred = input - self._by_channel(mean, input)
        y = centred * self._by_channel(ap2((var + self.eps).rsqrt()), input)
        if self.affine:
            y = y * self._by_channel(ap2(self.weight), input) + self._by_channel(self.bias, input)
        return y

    def _check_channels(self, input: Tensor) -> None:
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}: input must have {self.num_features} channels, got shape {tuple(input.shape)}; "
                "reshape it, or make the layer for its channels"
            )

    def _check_values(self, input: Tensor) -> None:
        if input.numel() < 2 * self.num_features:
            raise ValueError(
                f"{type(self).__name__}: input must have at least two values a channel where the batch's own mean and "
                f"variance serve, got shape {tuple(input.shape)}; pass a larger batch, or call eval()"
            )

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), momentum)

    @staticmethod
    def _by_channel(numbers: Tensor, input: Tensor) -> Tensor:
        return numbers.view(1, -1, *[1] * (input.dim() - 2))


class ShiftBatchNorm1d(_ShiftBatchNorm):
    """Batch normalisation by shifts of [samples, channels] and [samples, channels, length]; see the base class."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 3):
            raise ValueError(f"ShiftBatchNorm1d: input must be 2-D or 3-D, got {input.dim()}-D; reshape it")


class ShiftBatchNorm2d(_ShiftBatchNorm):
    """Batch normalisation by shifts of [samples, channels, height, width]; see the base class."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError(f"ShiftBatchNorm2d: input must be 4-D, got {input.dim()}-D; reshape it")
