"""Every registered torch.nn class comes back from its file, arguments, state and outputs."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from tersetorch.storage import load, registry, save


def x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


VECTORS, SERIES, IMAGES, VOLUMES = x(3, 6), x(2, 4, 10), x(2, 4, 8, 10), x(2, 4, 6, 5, 8)
CLASSES = torch.tensor([0, 5, 2])
TOKENS = torch.tensor([[1, 2, 0], [4, 4, 3]])

CASES = [
    (nn.Linear(6, 3, bias=False), VECTORS),
    (nn.Bilinear(6, 6, 2), VECTORS, VECTORS),
    (nn.Identity(), VECTORS),
    (nn.Flatten(0, 1), VECTORS),
    (nn.Unflatten(1, (2, 3)), VECTORS),
    (nn.Embedding(5, 3, padding_idx=0, max_norm=1.0), TOKENS),
    (nn.EmbeddingBag(5, 3, mode="sum", include_last_offset=False), TOKENS),
    (nn.Conv1d(4, 6, 3, stride=2, padding="valid", dilation=2), SERIES),
    (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2, bias=False, padding_mode="reflect"), IMAGES),
    (nn.Conv2d(4, 6, 3, padding="same"), IMAGES),
    (nn.Conv3d(4, 2, 2, stride=(1, 2, 1)), VOLUMES),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), SERIES),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), IMAGES),
    (nn.ConvTranspose3d(4, 2, 2, bias=False), VOLUMES),
    (nn.Unfold((2, 3), padding=1), IMAGES),
    (nn.Fold((4, 5), (2, 2)), x(2, 8, 12)),
    (nn.BatchNorm1d(6, eps=1e-3, momentum=None), VECTORS),
    (nn.BatchNorm2d(4, affine=False), IMAGES),
    (nn.BatchNorm3d(4, track_running_stats=False), VOLUMES),
    (nn.InstanceNorm1d(4, affine=True), SERIES),
    (nn.InstanceNorm2d(4, track_running_stats=True), IMAGES),
    (nn.InstanceNorm3d(4), VOLUMES),
    (nn.LayerNorm([8, 10], eps=1e-3), IMAGES),
    (nn.LayerNorm(10, elementwise_affine=False), IMAGES),
    (nn.LayerNorm(10, bias=False), IMAGES),
    (nn.GroupNorm(2, 4), IMAGES),
    (nn.RMSNorm(10, eps=1e-4), IMAGES),
    (nn.LocalResponseNorm(3, k=2.0), IMAGES),
    (nn.MaxPool1d(2, padding=1), SERIES),
    (nn.MaxPool2d(3, 2, ceil_mode=True), IMAGES),
    (nn.MaxPool3d((1, 2, 3), dilation=1), VOLUMES),
    (nn.AvgPool1d(2, count_include_pad=False), SERIES),
    (nn.AvgPool2d((2, 3), divisor_override=5), IMAGES),
    (nn.AvgPool3d(2), VOLUMES),
    (nn.LPPool1d(2, 3), SERIES),
    (nn.LPPool2d(1.5, 2, stride=1), IMAGES),
    (nn.LPPool3d(2, 2), VOLUMES),
    (nn.AdaptiveAvgPool1d(3), SERIES),
    (nn.AdaptiveAvgPool2d((None, 2)), IMAGES),
    (nn.AdaptiveAvgPool3d(1), VOLUMES),
    (nn.AdaptiveMaxPool1d(3, return_indices=True), SERIES),
    (nn.AdaptiveMaxPool2d((2, 2)), IMAGES),
    (nn.AdaptiveMaxPool3d(2), VOLUMES),
    (nn.MaxUnpool1d(2),),
    (nn.MaxUnpool2d(2, stride=(2, 1)),),
    (nn.MaxUnpool3d(2),),
    (nn.Dropout(0.3), VECTORS),
    (nn.Dropout1d(0.3), SERIES),
    (nn.Dropout2d(0.3, inplace=False), IMAGES),
    (nn.Dropout3d(0.3), VOLUMES),
    (nn.AlphaDropout(0.2), VECTORS),
    (nn.FeatureAlphaDropout(0.2), SERIES),
    (nn.ReLU(inplace=True), VECTORS.clone()),
    (nn.ReLU6(), VECTORS),
    (nn.LeakyReLU(0.2), VECTORS),
    (nn.PReLU(6, init=0.1), VECTORS),
    (nn.RReLU(0.1, 0.2), VECTORS),
    (nn.ELU(0.5), VECTORS),
    (nn.SELU(), VECTORS),
    (nn.CELU(0.5), VECTORS),
    (nn.GELU("tanh"), VECTORS),
    (nn.SiLU(), VECTORS),
    (nn.Mish(), VECTORS),
    (nn.GLU(dim=0), x(4, 6)),
    (nn.Sigmoid(), VECTORS),
    (nn.LogSigmoid(), VECTORS),
    (nn.Tanh(), VECTORS),
    (nn.Tanhshrink(), VECTORS),
    (nn.Threshold(0.1, -2), VECTORS),
    (nn.Hardtanh(-2, float("inf")), VECTORS),
    (nn.Hardsigmoid(), VECTORS),
    (nn.Hardswish(), VECTORS),
    (nn.Hardshrink(0.2), VECTORS),
    (nn.Softshrink(0.2), VECTORS),
    (nn.Softplus(2, 10), VECTORS),
    (nn.Softsign(), VECTORS),
    (nn.Softmax(dim=0), VECTORS),
    (nn.Softmax2d(), IMAGES),
    (nn.Softmin(dim=1), VECTORS),
    (nn.LogSoftmax(dim=1), VECTORS),
    (nn.ConstantPad1d(2, 1.5), SERIES),
    (nn.ConstantPad2d((1, 0, 2, 0), 3), IMAGES),
    (nn.ConstantPad3d(1, 0.5), VOLUMES),
    (nn.ReflectionPad1d(2), SERIES),
    (nn.ReflectionPad2d((1, 2, 1, 0)), IMAGES),
    (nn.ReflectionPad3d(1), VOLUMES),
    (nn.ReplicationPad1d(2), SERIES),
    (nn.ReplicationPad2d(1), IMAGES),
    (nn.ReplicationPad3d(1), VOLUMES),
    (nn.ZeroPad1d(2), SERIES),
    (nn.ZeroPad2d((1, 0, 0, 1)), IMAGES),
    (nn.ZeroPad3d(1), VOLUMES),
    (nn.CircularPad1d(2), SERIES),
    (nn.CircularPad2d(1), IMAGES),
    (nn.CircularPad3d(1), VOLUMES),
    (nn.Upsample(scale_factor=(2, 1.5), mode="bilinear", align_corners=True), IMAGES),
    (nn.UpsamplingNearest2d(scale_factor=2), IMAGES),
    (nn.UpsamplingBilinear2d((5, 5)), IMAGES),
    (nn.PixelShuffle(2), IMAGES),
    (nn.PixelUnshuffle(2), IMAGES),
    (nn.ChannelShuffle(2), IMAGES),
    (nn.CosineSimilarity(dim=0), VECTORS, VECTORS),
    (nn.PairwiseDistance(1.0, keepdim=True), VECTORS, VECTORS),
    (nn.SyncBatchNorm(4, eps=1e-3), IMAGES),
    (nn.FractionalMaxPool2d(2, output_size=(3, 4)),),
    (nn.FractionalMaxPool3d((2, 2, 1), output_ratio=0.5, return_indices=True),),
    (nn.ParameterList([torch.ones(2, 3), torch.zeros(())]),),
    (nn.ParameterList(),),
    (nn.ParameterDict(OrderedDict(two=torch.ones(2), one=torch.zeros(3, 1))),),
    (nn.L1Loss(reduction="sum"), VECTORS, VECTORS + 1),
    (nn.MSELoss(), VECTORS, VECTORS + 1),
    (nn.SmoothL1Loss(beta=0.5), VECTORS, VECTORS + 1),
    (nn.HuberLoss(delta=0.5), VECTORS, VECTORS + 1),
    (nn.BCELoss(), VECTORS.sigmoid(), VECTORS.sigmoid()),
    (nn.BCEWithLogitsLoss(), VECTORS, VECTORS.sigmoid()),
    (nn.NLLLoss(ignore_index=1), VECTORS, CLASSES),
    (nn.CrossEntropyLoss(label_smoothing=0.1), VECTORS, CLASSES),
    (nn.KLDivLoss(reduction="batchmean", log_target=True), VECTORS, VECTORS + 1),
    (nn.PoissonNLLLoss(log_input=False, full=True), VECTORS.abs(), VECTORS.abs()),
    (nn.GaussianNLLLoss(full=True), VECTORS, VECTORS + 1, VECTORS.abs()),
    (nn.CTCLoss(blank=1, zero_infinity=True),),
    (nn.SoftMarginLoss(), VECTORS, VECTORS.sign()),
    (nn.MultiLabelMarginLoss(), VECTORS, torch.zeros(3, 6, dtype=torch.int64)),
    (nn.MultiLabelSoftMarginLoss(), VECTORS, VECTORS.sigmoid()),
    (nn.MultiMarginLoss(p=2, margin=0.5), VECTORS, CLASSES),
    (nn.HingeEmbeddingLoss(margin=0.5), VECTORS, VECTORS.sign()),
    (nn.CosineEmbeddingLoss(margin=0.5), VECTORS, VECTORS + 1, VECTORS[:, 0].sign()),
    (nn.MarginRankingLoss(margin=0.5), VECTORS, VECTORS + 1, VECTORS.sign()),
    (nn.TripletMarginLoss(p=1.0, swap=True), VECTORS, VECTORS + 1, VECTORS - 1),
    (nn.RNN(6, 5, num_layers=2, nonlinearity="relu"), VECTORS),
    (nn.LSTM(6, 5, batch_first=True, bidirectional=True, proj_size=2), x(2, 3, 6)),
    (nn.GRU(6, 5, bias=False, dropout=0.1, num_layers=2), VECTORS),
    (nn.RNNCell(6, 5, nonlinearity="relu"), VECTORS),
    (nn.LSTMCell(6, 5, bias=False), VECTORS),
    (nn.GRUCell(6, 5), VECTORS),
    (nn.MultiheadAttention(6, 2, bias=False, add_bias_kv=True, batch_first=True), *[x(2, 3, 6)] * 3),
    (nn.MultiheadAttention(6, 3, kdim=4, vdim=10, add_zero_attn=True), x(5, 2, 6), x(7, 2, 4), x(7, 2, 10)),
    (nn.TransformerEncoderLayer(6, 2, 8, activation="gelu", norm_first=True), VECTORS),
    (nn.TransformerEncoderLayer(6, 2, 8, activation=F.relu, batch_first=True, bias=False), x(2, 3, 6)),
    (nn.TransformerEncoderLayer(6, 2, 8, activation=nn.GELU()), VECTORS),
    (nn.TransformerEncoderLayer(6, 2, 8, activation=F.silu), VECTORS),
    (nn.TransformerDecoderLayer(6, 2, 8, activation=torch.tanh), VECTORS, VECTORS),
    (nn.TransformerDecoderLayer(6, 3, 8, dropout=0.2, layer_norm_eps=1e-3), VECTORS, VECTORS),
    (nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 3, nn.LayerNorm(6)), x(2, 3, 6)),
    (nn.TransformerDecoder(nn.TransformerDecoderLayer(6, 2, 8), 2), VECTORS, VECTORS),
    (nn.Transformer(6, 2, 1, 2, 8, batch_first=True), x(2, 3, 6), x(2, 4, 6)),
    (nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))), VECTORS),
    (nn.ModuleList([nn.Linear(2, 3), nn.ReLU()]),),
    (nn.ModuleDict({"one [1]": nn.Linear(2, 3), "two": nn.ModuleList()}),),
]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("case", CASES, ids=lambda case: type(case[0]).__name__)
def test_every_kind_comes_back(case, round_trip):
    module, *inputs = case
    module.train()
    loaded = round_trip(module, *inputs)
    assert repr(loaded) == repr(module)


def test_every_registered_kind_is_among_the_cases():
    covered = {type(inner) for case in CASES for inner in case[0].modules()}
    torch_kinds = {kind.cls for kind in registry._by_name.values() if kind.cls.__module__.startswith("torch.")}
    assert torch_kinds == covered


@pytest.mark.parametrize(
    "module",
    [nn.Hardtanh(-1, 1), nn.Hardtanh(-1, 2.0), nn.ELU(1), nn.Softplus(1), nn.CrossEntropyLoss(label_smoothing=0)],
    ids=repr,
)
def test_ints_in_the_place_of_default_floats_stay_ints(tmp_path, module):
    save(nn.Sequential(module), tmp_path / "m.terse")
    built = load(tmp_path / "m.terse")[0]
    assert repr(built) == repr(module)
