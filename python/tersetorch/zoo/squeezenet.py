"""SqueezeNet, AlexNet's accuracy with a fiftieth of its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from tersetorch.storage import register_module
from tersetorch.zoo.checks import check_count, check_images, check_rate

Version = Literal["1.0", "1.1"]
Bypass = Literal["simple", "complex"]
Pooled = Literal["early", "late"]

# What the two published versions are beside FireNet's defaults.
VERSIONS: Mapping[str, Mapping[str, Any]] = {
    "1.0": {"last_padding": 1},
    "1.1": {"first": (64, 3, 2), "pooled": "early"},
}
# A file that asks for more fires than this is none.
MOST_FIRES = 256

# So that torch.fx, and with it convert, can follow a network that looks at its input.
fx.wrap("check_images")


def fire_channels(
    fires: int, base_e: int, incr_e: int, freq: int, pct_3x3: float, squeeze_ratio: float, where: str = "fire_channels"
) -> list[tuple[int, int, int]]:
    """Squeeze, 1x1 and 3x3 expand channels of fires i = 0, 1, ... by the paper's metaparameters.

        e_i = base_e + incr_e floor(i / freq)
        e_i,3x3 = pct_3x3 e_i
        e_i,1x1 = e_i - e_i,3x3
        s_i = squeeze_ratio e_i

    Args:
        fires: how many, from 1 to 256.
        base_e: expand channels of the first fire, at least 1.
        incr_e: so many more after every freq fires, at least 0.
        freq: fires of one width, at least 1.
        pct_3x3: share of the expand channels that are 3x3, in [0, 1].
        squeeze_ratio: squeeze over expand channels, SR in the paper, in (0, 1].
        where: what an error begins with.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, or makes no whole number of channels.

    Source:
        Iandola et al., SqueezeNet (2016), section 5.1.
    """
    for name, count, least in (("fires", fires, 1), ("base_e", base_e, 1), ("incr_e", incr_e, 0), ("freq", freq, 1)):
        check_count(where, name, count, least)
    if fires > MOST_FIRES:
        raise ValueError(f"{where}: fires must be at most {MOST_FIRES}, got {fires}; pass a smaller number")
    for name, share, range_ in (("pct_3x3", pct_3x3, "[0, 1]"), ("squeeze_ratio", squeeze_ratio, "(0, 1]")):
        if not isinstance(share, int | float) or isinstance(share, bool):
            raise TypeError(f"{where}: {name} must be a number, got {share!r}; pass a share such as 0.5")
        if not 0 <= share <= 1 or (share == 0 and range_[0] == "("):
            raise ValueError(f"{where}: {name} must be in {range_}, got {share}; pass a share such as 0.5")
    channels = []
    for i in range(fires):
        e = base_e + incr_e * (i // freq)
        threes = _whole(where, "pct_3x3", pct_3x3, e)
        channels.append((_whole(where, "squeeze_ratio", squeeze_ratio, e), e - threes, threes))
    return channels


class FireNet(nn.Module):
    """A convolution, fire modules as metaparameters ask for and a 1x1 convolution to the classes, averaged over images.

    Takes [N, 3, height, width]; gives logits [N, classes]. With the defaults it is SqueezeNet 1.0 but for the padding
    of the last convolution. Layers are counted from 1, the first convolution; fires are fire2, fire3, ...; max pooling
    is 3x3 with stride 2 and rounds up. For CIFAR's images:

        FireNet(10, fires=6, base_e=32, incr_e=32, first=(32, 3, 1))

    A bypass adds a fire's input to its output: "simple" around those whose channels agree; "complex" also around the
    others, through a 1x1 convolution to as many channels.

    Source:
        Iandola et al., SqueezeNet (2016): sections 3 (fire modules, late pooling), 5 (metaparameters) and 6 (bypass).
    """

    def __init__(
        self,
        classes: int = 1000,
        bypass: Bypass | None = None,
        *,
        fires: int = 8,
        base_e: int = 128,
        incr_e: int = 128,
        freq: int = 2,
        pct_3x3: float = 0.5,
        squeeze_ratio: float = 0.125,
        pooled: Pooled | Sequence[int] = "late",
        first: tuple[int, int, int] = (96, 7, 2),
        dropout: float = 0.5,
        last_padding: int = 0,
    ) -> None:
        """Draws fresh weights.

        Args:
            classes: logits to compute, at least 1.
            bypass: "simple", "complex" or None.
            fires: as fire_channels takes it, and so are the next five.
            base_e: see fires.
            incr_e: see fires.
            freq: see fires.
            pct_3x3: see fires.
            squeeze_ratio: see fires.
            pooled: the layers that max pooling follows, rising, such as (1, 4, 8); "late" is (1, fires / 2, fires)
                and "early" (1, fires / 4 + 1, fires / 2 + 1), rounded down, as in SqueezeNet 1.0 and 1.1.
            first: channels, taps of a side and stride of the first convolution, which pads nothing.
            dropout: rate before the last convolution, in [0, 1).
            last_padding: of the last convolution, at least 0.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is unknown or outside its range, makes no whole number of channels, or a simple
                bypass would go around no fire.
        """
        super().__init__()
        where = self._get_name()
        check_count(where, "classes", classes)
        if bypass not in (None, *get_args(Bypass)):
            raise ValueError(f"{where}: bypass must be 'simple', 'complex' or None, got {bypass!r}; pass one of these")
        channels = fire_channels(fires, base_e, incr_e, freq, pct_3x3, squeeze_ratio, where)
        check_rate(where, "dropout", dropout)
        check_count(where, "last_padding", last_padding, least=0)
        self.classes = classes
        self.bypass = bypass
        self.fires = fires
        self.base_e, self.incr_e, self.freq = base_e, incr_e, freq
        self.pct_3x3, self.squeeze_ratio = float(pct_3x3), float(squeeze_ratio)
        self.pooled = _pooled(where, pooled, fires)
        self.first = _first(where, first)
        self.dropout = float(dropout)
        self.last_padding = last_padding

        inputs, side, stride = self.first
        # The least image side with which no pooling window is larger than what it pools.
        least = 1
        for _ in self.pooled:
            least = max(3, 2 * least)
        self.least = (least - 1) * stride + side
        self.conv1 = nn.Conv2d(3, inputs, side, stride)
        self.relu1 = nn.ReLU()
        for number, sizes in enumerate(channels, 2):
            around = _bypass(bypass, inputs, sum(sizes[1:]))
            fire = Fire(inputs, *sizes) if around is None else BypassedFire(inputs, *sizes, around)
            self.add_module(f"fire{number}", fire)
            inputs = sum(sizes[1:])
        if bypass == "simple" and not any(isinstance(module, BypassedFire) for module in self.children()):
            raise ValueError(
                f"{where}: bypass='simple' must find a fire with as many inputs as outputs, got none; raise freq"
            )
        self.add_module(f"dropout{fires + 1}", nn.Dropout(dropout))
        self.add_module(f"conv{fires + 2}", nn.Conv2d(inputs, classes, 1, padding=last_padding))
        self.add_module(f"relu{fires + 2}", nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, height, width].

        Raises:
            TypeError, ValueError: images is no tensor of that shape, or smaller than the poolings need.
        """
        check_images(self._get_name(), images, 3, least=self.least)
        # Not an if: convert fuses ReLUs only where a forward has one path.
        x = (_keep, _pool)[1 in self.pooled](self.relu1(self.conv1(images)))
        for number in range(2, self.fires + 2):
            x = self.get_submodule(f"fire{number}")(x)
            x = (_keep, _pool)[number in self.pooled](x)
        for name in (f"dropout{self.fires + 1}", f"conv{self.fires + 2}", f"relu{self.fires + 2}"):
            x = self.get_submodule(name)(x)
        logits: Tensor = x.mean((2, 3))
        return logits


class SqueezeNet(FireNet):
    """The published networks: a FireNet of eight fire modules.

    Takes [N, 3, height, width], 227 x 227 in the paper; gives logits [N, classes]. Published weights want BGR images
    from 0 to 255 less the training set's mean, as `caffe_input` makes them.

    A bypass is around fire3, 5, 7 and 9 where it is "simple", and around all where it is "complex".

    | version | bypass | parameters | MACs of a 227 x 227 image |
    |---|---|---|---|
    | 1.0 | none, simple | 1,248,424 | 861,339,936 |
    | 1.0 | complex | 1,589,672 | 1,212,625,184 |
    | 1.1 | none, simple | 1,235,496 | 387,747,520 |
    | 1.1 | complex | 1,572,648 | 496,930,496 |

    Source:
        Iandola et al., SqueezeNet (2016), table 1, section 6 and table 3, and the files that the authors published:
        pooling rounds up, conv10 of version 1.0 has padding 1 and is followed by ReLU. torchvision's has no padding
        there, hence fewer MACs. Table 3 gives the complex bypass 7.7 MB; what its text describes takes 6.1.
    """

    def __init__(self, version: Version = "1.0", classes: int = 1000, bypass: Bypass | None = None) -> None:
        """Draws fresh weights.

        Args:
            version: "1.0" of the paper, or "1.1" with less than half of its MACs.
            classes: logits to compute, at least 1.
            bypass: "simple", "complex" or None.

        Raises:
            TypeError: classes is not an int.
            ValueError: version or bypass is unknown, or classes is less than 1.
        """
        if version not in get_args(Version):
            raise ValueError(f"SqueezeNet: version must be '1.0' or '1.1', got {version!r}; pass one of these")
        super().__init__(classes, bypass, **VERSIONS[version])
        self.version = version


class Fire(nn.Module):
    """s = relu(squeeze(x)); y = [relu(expand1x1(s)), relu(expand3x3(s))], from [N, inputs, ...] to [N, outputs, ...].

    Where one of the two expands has no channels, the other is y.

    Source:
        Iandola et al., SqueezeNet (2016), section 3.2.
    """

    def __init__(self, inputs: int, squeeze: int, ones: int, threes: int) -> None:
        """Draws fresh weights.

        Args:
            inputs: channels of x.
            squeeze: channels of s.
            ones: channels of y from 1x1 taps; 0 for none.
            threes: channels of y from 3x3 taps; 0 for none.
        """
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.squeeze_relu = nn.ReLU()
        self.expands = tuple(name for name, outputs in (("expand1x1", ones), ("expand3x3", threes)) if outputs)
        if ones:
            self.expand1x1 = nn.Conv2d(squeeze, ones, 1)
            self.expand1x1_relu = nn.ReLU()
        if threes:
            self.expand3x3 = nn.Conv2d(squeeze, threes, 3, padding=1)
            self.expand3x3_relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Y of x, both [N, channels, height, width]."""
        s = self.squeeze_relu(self.squeeze(x))
        # Not an if: see FireNet.
        return torch.cat([self.get_submodule(f"{e}_relu")(self.get_submodule(e)(s)) for e in self.expands], 1)


class BypassedFire(Fire):
    """A fire module whose input, as it is or through a layer, is added to its output: y = fire(x) + bypass(x).

    Source:
        Iandola et al., SqueezeNet (2016), section 6.
    """

    def __init__(self, inputs: int, squeeze: int, ones: int, threes: int, bypass: nn.Module) -> None:
        """Draws fresh weights.

        Args:
            inputs: as Fire takes it.
            squeeze: as Fire takes it.
            ones: as Fire takes it.
            threes: as Fire takes it.
            bypass: from [N, inputs, ...] to [N, ones + threes, ...].
        """
        super().__init__(inputs, squeeze, ones, threes)
        self.bypass = bypass

    def forward(self, x: Tensor) -> Tensor:
        """Y of x, both [N, channels, height, width]."""
        y: Tensor = super().forward(x) + self.bypass(x)
        return y


def _bypass(kind: Bypass | None, inputs: int, outputs: int) -> nn.Module | None:
    """What goes around a fire from inputs to outputs channels; None for nothing."""
    if kind is not None and inputs == outputs:
        return nn.Identity()
    return nn.Conv2d(inputs, outputs, 1) if kind == "complex" else None


def _whole(where: str, name: str, share: float, e: int) -> int:
    """So many of e channels; shares are written in decimals, so that a product may miss its whole number by a hair."""
    product = share * e
    if abs(product - round(product)) > 1e-6 or 0 < product < 0.5:
        raise ValueError(
            f"{where}: {name} must make a whole number of channels, got {share} of {e} = {product:g}; "
            f"change it, base_e or incr_e"
        )
    return round(product)


def _pooled(where: str, pooled: Pooled | Sequence[int], fires: int) -> tuple[int, ...]:
    if pooled in get_args(Pooled):
        if fires < 4:
            raise ValueError(f"{where}: pooled={pooled!r} must have 4 fires or more, got {fires}; pass layers instead")
        return (1, fires // 2, fires) if pooled == "late" else (1, fires // 4 + 1, fires // 2 + 1)
    if not isinstance(pooled, list | tuple) or not all(type(number) is int for number in pooled):
        raise TypeError(f"{where}: pooled must be 'early', 'late' or layers, got {pooled!r}; pass such as (1, 4, 8)")
    if list(pooled) != sorted(set(pooled) & set(range(1, fires + 2))):
        raise ValueError(
            f"{where}: pooled must be rising numbers of layers from 1 to {fires + 1}, got {pooled!r}; "
            "1 is the first convolution, 2 the first fire"
        )
    return tuple(pooled)


def _first(where: str, first: tuple[int, int, int]) -> tuple[int, int, int]:
    if not isinstance(first, list | tuple) or len(first) != 3:
        raise TypeError(f"{where}: first must be channels, taps and stride, got {first!r}; pass such as (96, 7, 2)")
    channels, side, stride = first
    for name, value in (("channels", channels), ("taps", side), ("stride", stride)):
        check_count(where, f"{name} of first", value)
    return channels, side, stride


def _keep(x: Tensor) -> Tensor:
    return x


def _pool(x: Tensor) -> Tensor:
    return functional.max_pool2d(x, 3, 2, ceil_mode=True)


def _config(model: SqueezeNet) -> dict[str, Any]:
    # Without a bypass nothing is said of it, as in files from before there was one.
    bypass = {} if model.bypass is None else {"bypass": model.bypass}
    return {"version": model.version, "classes": model.classes, **bypass}


register_module("zoo.SqueezeNet", SqueezeNet, _config)
# All that its constructor takes, by name.
register_module(
    "zoo.FireNet",
    FireNet,
    lambda model: {name: getattr(model, name) for name in inspect.signature(FireNet).parameters},
)
