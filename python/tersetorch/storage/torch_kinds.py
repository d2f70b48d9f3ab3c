"""The torch.nn modules that tt.load rebuilds: those whose constructor arguments can be read back from them."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tersetorch.storage.registry import Config, Kind, add, config_of

# Arguments that say where or from what a module is made, or are old spellings of others.
_NOT_CONFIG = (
    "self",
    "args",
    "kwargs",
    "device",
    "dtype",
    "_weight",
    "_freeze",
    "min_value",
    "max_value",
    "size_average",
    "reduce",
)

# Classes whose attributes have the names of their constructor's arguments.
_PLAIN = """
    Linear Bilinear Identity Flatten Unflatten Embedding EmbeddingBag
    Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Fold Unfold
    BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
    LayerNorm GroupNorm RMSNorm LocalResponseNorm
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    MaxUnpool1d MaxUnpool2d MaxUnpool3d FractionalMaxPool2d FractionalMaxPool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout
    ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish GLU Sigmoid LogSigmoid Tanh Tanhshrink Threshold
    Hardtanh Hardsigmoid Hardswish Hardshrink Softshrink Softplus Softsign Softmax Softmax2d Softmin LogSoftmax
    ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d ReflectionPad3d
    ReplicationPad1d ReplicationPad2d ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
    CircularPad1d CircularPad2d CircularPad3d
    Upsample UpsamplingNearest2d UpsamplingBilinear2d PixelShuffle PixelUnshuffle ChannelShuffle
    CosineSimilarity
    L1Loss MSELoss SmoothL1Loss HuberLoss BCELoss BCEWithLogitsLoss NLLLoss CrossEntropyLoss KLDivLoss PoissonNLLLoss
    GaussianNLLLoss CTCLoss SoftMarginLoss MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss
    HingeEmbeddingLoss CosineEmbeddingLoss MarginRankingLoss TripletMarginLoss
"""

# Classes that are only their children.
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")

_RNN = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_RECURRENT = {"RNN": (*_RNN, "nonlinearity"), "LSTM": (*_RNN, "proj_size"), "GRU": _RNN}
_CELLS = {
    "RNNCell": ("input_size", "hidden_size", "bias", "nonlinearity"),
    "LSTMCell": ("input_size", "hidden_size", "bias"),
    "GRUCell": ("input_size", "hidden_size", "bias"),
}

# Functions that a module may be given, by the name that a file has for them.
_FUNCTIONS = """
    relu relu6 leaky_relu rrelu elu selu celu gelu silu mish sigmoid logsigmoid tanh tanhshrink
    hardtanh hardsigmoid hardswish hardshrink softshrink softplus softsign
"""
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(F, name) for name in _FUNCTIONS.split()},
    "torch.relu": torch.relu,
    "torch.sigmoid": torch.sigmoid,
    "torch.tanh": torch.tanh,
}
_ACTIVATION_NAMES = {function: name for name, function in _ACTIVATIONS.items()}


def _rnn_defaults(
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    bidirectional: bool = False,
    proj_size: int = 0,
    nonlinearity: str = "tanh",
) -> None:
    """The arguments of nn.RNN, nn.LSTM and nn.GRU, whose own constructors take *args."""


def _attention(module: nn.MultiheadAttention) -> Config:
    return {
        "embed_dim": module.embed_dim,
        "num_heads": module.num_heads,
        "dropout": module.dropout,
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "add_zero_attn": module.add_zero_attn,
        "kdim": module.kdim,
        "vdim": module.vdim,
        "batch_first": module.batch_first,
    }


def _transformer_layer(module: Any) -> Config:
    attention = module.self_attn
    activation = {} if "activation" in module._modules else {"activation": _ACTIVATION_NAMES[module.activation]}
    return {
        "d_model": attention.embed_dim,
        "nhead": attention.num_heads,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "layer_norm_eps": module.norm1.eps,
        "batch_first": attention.batch_first,
        "norm_first": module.norm_first,
        "bias": module.linear2.bias is not None,
        **activation,
    }


def _with_activation(cls: type[nn.Module]) -> Callable[..., nn.Module]:
    """The constructor of cls, its activation given by name."""

    def build(activation: str = "relu", **arguments: Any) -> nn.Module:
        return cls(activation=_ACTIVATIONS[activation], **arguments)

    return build


def _list_shapes(module: nn.ParameterList) -> Config:
    return {"shapes": tuple(tuple(parameter.shape) for parameter in module)}


def _dict_shapes(module: nn.ParameterDict) -> Config:
    return {"shapes": {name: tuple(parameter.shape) for name, parameter in module.items()}}


def _parameter_list(shapes: Sequence[Sequence[int]]) -> nn.Module:
    return nn.ParameterList(torch.empty(shape) for shape in shapes)


def _parameter_dict(shapes: dict[str, Sequence[int]]) -> nn.Module:
    # Of a plain dict the names would be sorted.
    return nn.ParameterDict(OrderedDict((name, torch.empty(shape)) for name, shape in shapes.items()))


def _distance(module: nn.PairwiseDistance) -> Config:
    return {"p": module.norm, "eps": module.eps, "keepdim": module.keepdim}


def _layers(config: Config) -> int:
    return int(config.get("num_layers", 1))


def _nothing(module: nn.Module) -> Config:
    return {}


# These take whole modules as arguments, which are children afterwards: any small one will do in their place.
def _encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(1, 1, 1), 1, enable_nested_tensor=False)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(1, 1, 1), 1)


def _transformer() -> nn.Module:
    return nn.Transformer(1, 1, 1, 1, 1)


def _register() -> None:
    for name in _PLAIN.split():
        cls = getattr(nn, name)
        names = [argument for argument in inspect.signature(cls.__init__).parameters if argument not in _NOT_CONFIG]
        add(Kind(name, cls, config_of(names, cls.__init__), cls))
    for name in _CONTAINERS:
        cls = getattr(nn, name)
        add(Kind(name, cls, _nothing, cls))
    for name, arguments in _RECURRENT.items():
        cls = getattr(nn, name)
        ignored = ("_flat_weights", "_flat_weight_refs")
        add(Kind(name, cls, config_of(arguments, _rnn_defaults), cls, ignored=ignored, tensors=_layers))
    for name, arguments in _CELLS.items():
        cls = getattr(nn, name)
        add(Kind(name, cls, config_of(arguments, cls.__init__), cls))
    linear = NonDynamicallyQuantizableLinear
    add(Kind("NonDynamicallyQuantizableLinear", linear, config_of(_LINEAR, linear.__init__), linear))
    add(Kind("MultiheadAttention", nn.MultiheadAttention, _attention, nn.MultiheadAttention))
    for layer in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer):
        add(
            Kind(
                layer.__name__,
                layer,
                _transformer_layer,
                _with_activation(layer),
                overrides=("activation_relu_or_gelu",),
            )
        )
    add(Kind("ParameterList", nn.ParameterList, _list_shapes, _parameter_list))
    add(Kind("ParameterDict", nn.ParameterDict, _dict_shapes, _parameter_dict))
    add(Kind("PairwiseDistance", nn.PairwiseDistance, _distance, nn.PairwiseDistance))
    nested = ("enable_nested_tensor", "use_nested_tensor", "mask_check")
    add(Kind("TransformerEncoder", nn.TransformerEncoder, _nothing, _encoder, ("num_layers", *nested)))
    add(Kind("TransformerDecoder", nn.TransformerDecoder, _nothing, _decoder, ("num_layers",)))
    add(Kind("Transformer", nn.Transformer, _nothing, _transformer, ("d_model", "nhead", "batch_first")))


_LINEAR = ("in_features", "out_features", "bias")
_register()
