"""Wrote version1.terse: every form and coder, both sparse layers, ties, flags and overrides; and, when they came,
version1_layouts.terse: every layout, and the sparse convolutions; version2.terse: the coders of version 2;
version2_packed_codes.terse: layers of codes as first written; version2_plain_codes.terse: as written now;
version2_signs.terse: rows of two values, and layers of signs; version2_vectors.terse: dense layers whose rows share
sub-vectors or are sums of shared rows; version2_codebooks.terse: dense weights with a table for each row or block of
columns; version2_integers.terse: dense weights that were integers; version2_fixed.terse: layers in fixed point;
version2_coders.terse: the coders and dtypes that no file before it had; version2_layers.terse: the same of our layers.
Of kinds whose modules are many or large, so that they are no seeds of fuzzing: kinds/version2_torch.terse and
kinds/version2_zoo.terse.

Run once for each version of the format and each new kind of layer; a file is then never written again.
"""

from pathlib import Path

import torch
from torch import nn

from tersetorch import zoo
from tersetorch.formats import CodebookWeight, FixedFormat, FixedWeight, ProductWeight, SignWeight
from tersetorch.formats.vector_codes import VectorCodes, decode, note_codes
from tersetorch.methods.binarize import ShiftBatchNorm1d, ShiftBatchNorm2d, Sign
from tersetorch.nn import (
    BinaryConv2d,
    BinaryLinear,
    ClusteredConv2d,
    CodebookConv2d,
    CodebookEmbedding,
    CodebookLinear,
    FixedPointConv2d,
    FixedPointLinear,
    FlattenedConv2d,
    LowRankConv2d,
    LowRankLinear,
    ProductConv2d,
    ProductLinear,
    ResidualConv2d,
    ResidualLinear,
    SignMaxPool2d,
    SparseCodebookConv1d,
    SparseCodebookConv2d,
    SparseCodebookLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLinear,
)
from tersetorch.storage import save, streams
from tersetorch.storage.importers.bitsandbytes import NF4

PROVENANCE = {"error": {"dense": 0.0164, "compressed": 0.0158}}


def numbers(*shape):
    """Numbers that are the same with every random generator."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float64) * 0.754877666).frac() - 0.5).float().reshape(shape)


def fill(layer, density=1.0, levels=None):
    """Weights of this share of non-zeros and about this many levels."""
    weight = numbers(*layer.weight.shape)
    kept = (torch.arange(weight.numel()) * 7919 % 1000 < 1000 * density).reshape(weight.shape)
    if levels:
        weight = (weight * levels).round() / levels
    with torch.no_grad():
        layer.weight.copy_(torch.where(kept, weight, 0))
        if getattr(layer, "bias", None) is not None:
            layer.bias.copy_(numbers(*layer.bias.shape))
    return layer


def model():
    """The model in the file."""
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    for parameter in encoder.parameters():
        parameter.data = numbers(*parameter.shape)
    encoder.linear1 = SparseLinear.from_dense(fill(encoder.linear1, 0.4))
    encoder.activation_relu_or_gelu = 0
    tied = nn.Embedding(6, 4)
    tied.weight.data = numbers(6, 4)
    head = nn.Linear(4, 6, bias=False)
    head.weight = tied.weight
    shared = nn.GELU("tanh")
    steps = torch.full((20, 50), -1.0)
    steps[::7, ::9] = numbers(3, 6)
    network = nn.Sequential(
        tied,
        encoder,
        shared,
        SparseCodebookLinear.from_dense(fill(nn.Linear(60, 24), 0.05, levels=4)),
        fill(nn.Linear(24, 30), 0.02),
        SparseLinear.from_dense(fill(nn.Linear(30, 30), 1.0)),
        shared,
        fill(nn.Linear(30, 30), 0.5),
        fill(nn.Linear(30, 20, bias=False), 0.1),
        fill(nn.Linear(20, 40), levels=2),
        fill(nn.Linear(40, 16), levels=15),
        fill(nn.Conv2d(2, 4, 3, padding="same")).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(4),
        fill(nn.Linear(4, 4)).bfloat16(),
        head,
        nn.ParameterDict({"shift": torch.full((40,), 0.3), "steps": steps}),
    )
    network[4].weight.requires_grad_(False)
    network.eval()
    network[12].train()
    return network


def layouts():
    """The model in the second file."""
    linear = fill(nn.Linear(70, 30), 0.3, levels=4)
    options = {"blocked": {"column_block": 32}, "blocked_int8": {"column_block": 32}}
    options["blocked_bfloat16"] = options["blocked"]
    names = ["csr16", "bitmap", "bitmap_int8", "bitmap_columns", *options]
    packed = [
        kind.from_dense(linear).pack(name, **options.get(name, {}))
        for kind in (SparseLinear, SparseCodebookLinear)
        for name in names
    ]
    strided = fill(nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=2, groups=2), 0.4, levels=4)
    same = fill(nn.Conv2d(6, 5, 3, padding="same", padding_mode="reflect", bias=False), 0.2)
    line = fill(nn.Conv1d(5, 4, 3), 0.4, levels=4)
    convolutions = [
        SparseCodebookConv2d.from_dense(strided),
        SparseConv2d.from_dense(same),
        SparseConv1d.from_dense(line),
        SparseCodebookConv1d.from_dense(line),
    ]
    return nn.ModuleList([*packed, *convolutions]).eval()


def coders():
    """The model in the file of version 2."""
    convolutions = [fill(nn.Conv2d(6, 9, 3), 0.3, levels=20), fill(nn.Conv1d(6, 8, 4, bias=False), 0.4, levels=9)]
    rounded = fill(nn.Linear(20, 12)).bfloat16().float()
    crossed = fill(nn.Conv2d(8, 16, 3))
    with torch.no_grad():
        crossed.weight[:, :, ::2, ::2] = 0
    return nn.ModuleList(
        [
            *convolutions,
            SparseCodebookConv2d.from_dense(convolutions[0]),
            SparseConv1d.from_dense(convolutions[1]),
            fill(nn.Linear(70, 300), 0.2, levels=90),
            SparseCodebookLinear.from_dense(fill(nn.Linear(70, 300), 0.1, levels=90)),
            fill(nn.Linear(300, 40), levels=12),
            fill(nn.Linear(40, 30)),
            fill(nn.Linear(40, 30)).double(),
            rounded,
            crossed,
        ]
    ).eval()


def codes(rows, columns, entries):
    """Codes uint8 [rows, columns] below entries."""
    return (torch.arange(rows * columns) * 7919 % 1009 % entries).to(torch.uint8).reshape(rows, columns)


def coded_weight(rows, columns, entries, tables=1, block=0):
    return CodebookWeight.from_codes(codes(rows, columns, entries), numbers(tables, entries), column_block=block)


def products():
    """The model in the file of packed codes."""
    relu = CodebookLinear(coded_weight(12, 30, 16, 12), numbers(12), relu=True)
    return nn.ModuleList(
        [
            CodebookLinear(coded_weight(20, 70, 3), numbers(20)),
            relu,
            CodebookLinear(coded_weight(10, 70, 40, 3, 30)).pack("codebook_int8"),
            ProductLinear.from_codes(codes(70, 7, 20), numbers(1, 7, 3, 20), numbers(70), in_features=20),
            ResidualLinear.from_codes(codes(4, 3, 5), numbers(3, 1, 30, 5), in_features=30),
        ]
    ).eval()


def coded():
    """The model in the file of plain codes."""
    convolution = CodebookConv2d(coded_weight(6, 18, 9), numbers(6), kernel_size=3, padding=1)
    embedding = CodebookEmbedding(coded_weight(15, 33, 6), padding_idx=3, dtype=torch.bfloat16)
    return nn.ModuleList([*products(), convolution, embedding]).eval()


def sign_weight(rows, columns, taps=1, scale=None):
    return SignWeight.from_signs(codes(rows, columns, 2).bool(), taps, scale)


def signs():
    """The model in the file of signs."""
    dense = nn.Linear(70, 40)
    with torch.no_grad():
        dense.weight.copy_(sign_weight(40, 70, scale=numbers(40).abs()).to_dense())
        dense.bias.copy_(numbers(40))
    thresholds = (numbers(70) * 20).int()
    sizes = {"kernel_size": 3, "padding": 1, "groups": 2, "padding_value": -1}
    return nn.ModuleList(
        [
            dense,
            BinaryLinear(sign_weight(20, 70, scale=numbers(20).abs()), numbers(20)),
            BinaryLinear(sign_weight(70, 130), thresholds=thresholds),
            BinaryLinear(sign_weight(70, 130, 2), dtype=torch.bfloat16),
            BinaryLinear(sign_weight(9, 65), numbers(9), inputs="real"),
            BinaryConv2d(sign_weight(70, 45, 9), thresholds=thresholds, **sizes),
            SignMaxPool2d(3, 2, 1, ceil_mode=True, flips=codes(1, 2, 5)[0].long()),
            ShiftBatchNorm1d(5, eps=0.001),
            Sign(stochastic=True),
        ]
    ).eval()


def dense(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def tables():
    """The model in the file of codebooks."""
    of_rows, of_blocks = coded_weight(40, 300, 9, 40).to_dense(), numbers(4, 9)
    columns = codes(64, 200, 9).long()
    return nn.ModuleList(
        [
            dense(of_rows),
            dense(of_rows.reshape(80, 150).bfloat16().reshape(40, 300)),
            dense(of_blocks[torch.arange(200) // 50, columns]),
            dense(of_blocks[torch.arange(200) // 64, columns]),  # the last block is narrower
        ]
    ).eval()


def quantized():
    """The model in the file of integers."""
    whole = (numbers(24, 64) * 254).round()
    scales = numbers(24, 1) * 0.001 + 0.0015
    four = (whole / 17).round() * (whole.abs() > 8)
    steps = (numbers(48, 1) * 0.01 + 0.02).half()
    quantiles = torch.tensor(NF4)
    convolution = nn.Conv2d(16, 24, 2)
    convolution.weight = nn.Parameter((whole * scales).reshape(24, 16, 2, 2))
    convolution.bias = nn.Parameter(numbers(24))
    return nn.ModuleList(
        [
            convolution,
            dense(whole * scales.half() * 7.874015718698502e-3),
            dense((whole - 100) * scales[7]),
            dense((four.reshape(-1, 16) * (numbers(96, 1) * 0.01 + 0.02)).reshape(24, 64)),
            dense((four.bfloat16().reshape(-1, 32) * (numbers(48, 1) * 0.01 + 0.02).bfloat16()).reshape(24, 64)),
            dense((whole * scales).half()),
            dense((quantiles[codes(24, 64, 16).long()].reshape(-1, 32) * steps.float()).reshape(24, 64)),
            dense((((four + 8).reshape(-1, 32) * steps).float() - (steps * 7).half()).float().reshape(24, 64)),
        ]
    ).eval()


def vectors():
    """The model in the file of sub-vectors, and of sums whose codes the layers keep."""

    def filled(layer, *found):
        weight = decode(*found, layer.weight[0].numel()).view(layer.weight.shape).to(layer.weight.dtype)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(numbers(*layer.bias.shape))
        if len(found[1]) > 1:
            note_codes(layer, "weight", VectorCodes(*found))
        return layer

    digits = torch.stack([torch.arange(90) // base % 7 for base in (1, 7, 3)], 1).to(torch.uint8)
    return nn.ModuleList(
        [
            filled(nn.Linear(18, 60), codes(60, 5, 7), numbers(1, 5, 4, 7)),
            filled(nn.Linear(26, 80), codes(80, 9, 6), numbers(1, 1, 3, 6)),
            filled(nn.Conv2d(6, 50, 3).bfloat16(), codes(50, 9, 8), numbers(1, 9, 6, 8)),
            filled(nn.Linear(24, 60), codes(60, 3, 5), numbers(3, 1, 24, 5)),
            filled(nn.Conv2d(3, 90, 3).bfloat16(), digits, numbers(3, 1, 27, 7)),
        ]
    ).eval()


def fixed():
    """The model in the file of fixed point."""

    def weight(rows, columns, integer_bits, fraction_bits):
        return FixedWeight.from_dense(numbers(rows, columns), FixedFormat(integer_bits, fraction_bits))

    bias = (numbers(20) * 2**20).long()
    sizes = {"kernel_size": (3, 2), "padding": "same", "dilation": 2, "groups": 2, "padding_mode": "circular"}
    return nn.ModuleList(
        [
            FixedPointLinear(weight(20, 70, 2, 14), bias, input_format="<6,10>", output_format="<4,20>"),
            FixedPointLinear(weight(9, 20, 1, 7), input_format="<3,5>", output_format="<4,4>"),
            FixedPointConv2d(weight(20, 24, 2, 6), bias, input_format="<6,10>", output_format="<6,10>", **sizes),
        ]
    ).eval()


def filled(module):
    """A module whose parameters and buffers are numbers, but for those that count or order something."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(numbers(*tensor.shape))
    return module


def rare():
    """The model in the file of coders."""

    def of_sums(rows, steps, least):
        """A weight float32(float32(code scale) + offset), of a scale and an offset for each run of a row."""
        return (codes(rows, 64, 16) * steps + least).reshape(rows, 64)

    def halves(rows, size, least):
        """Numbers with as few bits as float16 has."""
        return (numbers(rows, 1) * size + least).half().float()

    def of_rows(rows, columns, negative):
        """Rows of one magnitude each; of the signs this share is negative."""
        signs = (torch.arange(rows * columns) * 7919 % 1000 < 1000 * negative).reshape(rows, columns)
        return torch.where(signs, -1.0, 1.0) * (numbers(rows, 1) + 1)

    # Codes that their neighbours tell.
    near = (torch.arange(16)[:, None] // 4 + torch.arange(32) // 4) % 8
    quantiles = torch.tensor(NF4)
    large = torch.arange(9).reshape(3, 3) + (1 << 15) - 4
    others = {
        "f8e4": numbers(5, 3).to(torch.float8_e4m3fn),
        "f8e5": numbers(5, 3).to(torch.float8_e5m2),
        "c64": torch.complex(numbers(3, 4), numbers(4, 3).T),
        "c128": torch.complex(numbers(3, 4), numbers(4, 3).T).to(torch.complex128),
        "u64": (large * large).to(torch.uint64),
        "u32": (large * 9973).to(torch.uint32),
        "u16": large.to(torch.uint16),
    }
    return nn.ModuleList(
        [
            dense(of_sums(2, torch.tensor([[1.0], [3.0]]) * 2**-20, (numbers(2, 1) * 2**23).round() / 2**24 + 1)),
            dense(of_sums(400, halves(400, 0.01, 0.02), halves(400, 1, 0))),
            dense(of_rows(400, 64, 0.5)),
            dense(of_rows(16, 640, 0.04)),
            dense((near - 3) * (numbers(16, 1) * 0.001 + 0.0015)),
            dense(quantiles[2 * near] * halves(16, 0.01, 0.02)),
            dense(numbers(16, 8).gather(1, near)),
            nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in others.items()}),
        ]
    ).eval()


def others_of_ours():
    """The model in the file of layers."""
    products = ProductWeight.from_codes(codes(12, 4, 5), numbers(1, 4, 9, 5), 36)
    sums = ProductWeight.from_codes(codes(10, 3, 6), numbers(3, 1, 27, 6), 27)
    clusters = ClusteredConv2d(6, 8, 3, (3, 2), in_clusters=2, out_clusters=4, padding=1, form="svd")
    clusters.input_order.copy_(torch.tensor([3, 0, 5, 1, 4, 2]))
    return nn.ModuleList(
        [
            filled(LowRankLinear(20, 12, 3)),
            filled(LowRankConv2d(5, 7, (3, 2), 4, stride=2, padding=1, form="separable", padding_mode="reflect")),
            filled(clusters),
            filled(ClusteredConv2d(4, 6, 3, out_clusters=3, bias=False, form="monochromatic")),
            filled(FlattenedConv2d(3, 6, (3, 5), padding=(1, 2), stages=2, rank=2, relu=True)),
            ProductConv2d(products, numbers(12), kernel_size=3, padding=1, relu=True),
            ResidualConv2d(sums, kernel_size=3, stride=2),
            filled(ShiftBatchNorm2d(5, momentum=0.2)),
        ]
    ).eval()


PLAIN_OF_TORCH = """
    Identity ReLU6 CELU ELU SELU SiLU Mish GLU Sigmoid LogSigmoid Tanh Tanhshrink Hardsigmoid Hardswish Hardtanh
    Hardshrink Softshrink Softplus Softsign Softmax2d LeakyReLU RReLU PReLU ReLU
    Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout CosineSimilarity PairwiseDistance
    L1Loss MSELoss SmoothL1Loss HuberLoss BCELoss BCEWithLogitsLoss NLLLoss CrossEntropyLoss KLDivLoss PoissonNLLLoss
    GaussianNLLLoss CTCLoss SoftMarginLoss MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss
    HingeEmbeddingLoss CosineEmbeddingLoss MarginRankingLoss TripletMarginLoss ModuleDict ParameterList
"""
OF_TWO = """
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d MaxUnpool1d MaxUnpool2d MaxUnpool3d
    AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d
    ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d
    ZeroPad1d ZeroPad2d ZeroPad3d CircularPad1d CircularPad2d CircularPad3d
    BatchNorm1d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
    PixelShuffle PixelUnshuffle ChannelShuffle LocalResponseNorm UpsamplingNearest2d UpsamplingBilinear2d
    Softmax Softmin LogSoftmax
"""


def of_torch():
    """The model in the file of torch's modules."""
    sizes = (3, 4, 2)
    layer = {"d_model": 4, "nhead": 2, "dim_feedforward": 3}
    modules = [
        *(getattr(nn, name)() for name in PLAIN_OF_TORCH.split()),
        *(getattr(nn, name)(2) for name in OF_TWO.split()),
        *(getattr(nn, name)(1, 0.5) for name in ("ConstantPad1d", "ConstantPad2d", "ConstantPad3d", "Threshold")),
        *(getattr(nn, name)(1.5, 2) for name in ("LPPool1d", "LPPool2d", "LPPool3d")),
        *(getattr(nn, name)(*sizes) for name in ("Bilinear", "Conv3d", "RNN", "LSTM", "GRU")),
        *(getattr(nn, f"ConvTranspose{dims}d")(*sizes, stride=2) for dims in (1, 2, 3)),
        *(getattr(nn, name)(3, 4, bias=False) for name in ("RNNCell", "LSTMCell", "GRUCell")),
        *(nn.FractionalMaxPool2d(2, output_size=3), nn.FractionalMaxPool3d(2, output_ratio=0.5)),
        *(nn.Flatten(0, 1), nn.Unflatten(1, (2, 3)), nn.Fold((4, 5), 2), nn.Unfold(2), nn.Upsample(scale_factor=2)),
        *(nn.EmbeddingBag(5, 3, mode="sum"), nn.GroupNorm(2, 4), nn.LayerNorm([2, 3]), nn.RMSNorm(3, eps=0.25)),
        *(nn.MultiheadAttention(4, 2, kdim=3, vdim=5), nn.MultiheadAttention(4, 2).out_proj),
        *(nn.TransformerDecoderLayer(**layer, norm_first=True), nn.TransformerDecoderLayer(**layer, activation="gelu")),
        nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer, batch_first=True), 2),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 1),
        nn.Transformer(4, 2, 1, 1, 3),
    ]
    return filled(nn.ModuleList(modules)).eval()


def of_the_zoo():
    """The model in the file of networks; AlexNet and VGG16 have no small form."""
    networks = nn.ModuleList(
        [
            zoo.LeNet300100(4, 3),
            zoo.LeNet5(3, dropout=0.25),
            zoo.CifarResNet(8, 3),
            zoo.MobileNet(0.01, 3),
            zoo.SqueezeNet("1.1", 3, "simple"),
            zoo.FireNet(3, fires=2, base_e=8, incr_e=8, squeeze_ratio=0.5, pooled=(1,), first=(4, 3, 2)),
            zoo.BinaryMLP(6, 3, 8, "sign", True),
            zoo.BinaryVGG(3, 2, "stochastic sign"),
            zoo.FlattenedCNN(1, 16, 3, (4, 5, 6), 7),
            zoo.Transformer(5, 4, 1, 2, 3),
        ]
    )
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter.fill_(0.25)
    return networks.eval()


# Limits that make small tensors take the coders of large ones.
SMALL = {"MAX_CONTEXT_BITS": 3000, "MAX_NUMBERS": 300}


if __name__ == "__main__":
    folder = Path(__file__).parent
    for name, value in SMALL.items():
        setattr(streams, name, value)
    files = {"version1": (model, PROVENANCE), "version1_layouts": (layouts, None), "version2": (coders, None)}
    files |= {"version2_packed_codes": (products, None), "version2_plain_codes": (coded, None)}
    files |= {"version2_signs": (signs, None), "version2_vectors": (vectors, None)}
    files |= {"version2_codebooks": (tables, None), "version2_integers": (quantized, None)}
    files |= {
        "version2_fixed": (fixed, None),
        "version2_coders": (rare, None),
        "version2_layers": (others_of_ours, None),
    }
    files |= {"kinds/version2_torch": (of_torch, None), "kinds/version2_zoo": (of_the_zoo, None)}
    for name, (network, notes) in files.items():
        path = folder / f"{name}.terse"
        if not path.exists():
            save(network(), path, provenance=notes)
