import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tersetorch.methods.prune import diagonal_hessian
from tersetorch.methods.prune.backward_recursion import Tape

FORMS = ["exact", "levenberg_marquardt"]


def true_diagonal(model, name, x, target, loss):
    """The diagonal of the Hessian by one weight, from autograd."""
    path = f"{name}.weight" if name != "weight" else name
    parameters = dict(model.named_parameters())

    def of(weight):
        return loss(torch.func.functional_call(model, parameters | {path: weight}, (x,)), target)

    weight = parameters[path].detach()
    return torch.func.hessian(of)(weight).reshape(weight.numel(), -1).diagonal().reshape(weight.shape).detach()


class Units:
    """The paper's formulas, unit by unit and connection by connection, in plain Python.

    A unit has connections (source unit, weight, key) and a bias: a_i = sum_j w_ij x_j + b, x_i = f(a_i). Connections
    of one key share a weight.
    """

    def __init__(self, inputs):
        self.x = [float(value) for value in np.ravel(inputs)]
        self.a = [0.0] * len(self.x)
        self.connections = [[] for _ in self.x]
        self.f = [None] * len(self.x)

    def add(self, connections, bias=0.0, f=lambda a: (a, 1.0, 0.0)):
        """A unit; f gives f, f' and f''."""
        a = bias + sum(weight * self.x[source] for source, weight, _ in connections)
        self.a.append(a)
        self.x.append(f(a)[0])
        self.connections.append(connections)
        self.f.append(f)
        return len(self.x) - 1

    def second_derivatives(self, first, second, exact):
        """h by key, from dE/dx and d2E/dx2 of the output units."""
        first_x, second_x = dict(first), dict(second)
        found = {}
        for unit in reversed(range(len(self.x))):
            if unit not in second_x or self.f[unit] is None:
                continue
            _, slope, bend = self.f[unit](self.a[unit])
            first_a = slope * first_x[unit]
            second_a = slope**2 * second_x[unit] + (bend * first_x[unit] if exact else 0.0)
            for source, weight, key in self.connections[unit]:
                first_x[source] = first_x.get(source, 0.0) + weight * first_a
                second_x[source] = second_x.get(source, 0.0) + weight**2 * second_a
                if key is not None:
                    found[key] = found.get(key, 0.0) + second_a * self.x[source] ** 2
        return found


def tanh(a):
    t = math.tanh(2 / 3 * a)
    return 1.7159 * t, 1.7159 * 2 / 3 * (1 - t * t), 1.7159 * 4 / 9 * -2 * t * (1 - t * t)


def sigmoid(a):
    s = 1 / (1 + math.exp(-a))
    return s, s * (1 - s), s * (1 - s) * (1 - 2 * s)


def relu(a):
    return max(a, 0.0), float(a > 0), 0.0


def dense(units, sources, layer, name, f):
    """A Linear layer's units."""
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [
        units.add([(j, weight[i][c], (name, i, c)) for c, j in enumerate(sources)], bias[i], f)
        for i in range(len(weight))
    ]


def convolution(units, images, layer, name, f):
    """A Conv2d's units: images[channel][row][column] are units, None where there is none."""
    kernel, bias = layer.weight.tolist(), layer.bias.tolist()
    (sy, sx), (py, px), (dy, dx) = layer.stride, layer.padding, layer.dilation
    rows, columns = len(images[0]), len(images[0][0])
    inside = len(images) // layer.groups
    outside = layer.out_channels // layer.groups
    ky, kx = layer.kernel_size
    result = []
    for o in range(layer.out_channels):
        first = o // outside * inside
        plane = []
        for y in range((rows + 2 * py - dy * (ky - 1) - 1) // sy + 1):
            line = []
            for x in range((columns + 2 * px - dx * (kx - 1) - 1) // sx + 1):
                connections = []
                for c in range(inside):
                    for v in range(ky):
                        for u in range(kx):
                            row, column = y * sy - py + v * dy, x * sx - px + u * dx
                            if 0 <= row < rows and 0 <= column < columns:
                                source = images[first + c][row][column]
                                connections.append((source, kernel[o][c][v][u], (name, o, c, v, u)))
                line.append(units.add(connections, bias[o], f))
            plane.append(line)
        result.append(plane)
    return result


def averages(units, images, size):
    """Average pooling as units with constant connections."""
    return [
        [
            [
                units.add(
                    [(plane[y + v][x + u], 1 / size**2, None) for v in range(size) for u in range(size)],
                )
                for x in range(0, len(plane[0]) - size + 1, size)
            ]
            for y in range(0, len(plane) - size + 1, size)
        ]
        for plane in images
    ]


def flat(tree):
    return [tree] if not isinstance(tree, list) else [leaf for each in tree for leaf in flat(each)]


def reference(build, model, x, target, exact):
    """The mean over patterns of what Units says under E = sum (d - x)^2, as tensors by layer."""
    found = {name: torch.zeros_like(layer.weight) for name, layer in model.named_modules() if hasattr(layer, "weight")}
    for pattern, wanted in zip(x, target, strict=True):
        units = Units(pattern.numpy())
        outputs = build(units, model, pattern.shape)
        first = {unit: 2 * (units.x[unit] - d) for unit, d in zip(outputs, wanted.tolist(), strict=True)}
        second = dict.fromkeys(outputs, 2.0)
        for (name, *place), h in units.second_derivatives(first, second, exact).items():
            found[name][tuple(place)] += h / len(x)
    return found


class ScaledTanh(nn.Module):
    def forward(self, x):
        return 1.7159 * torch.tanh(2 / 3 * x)


class Perceptron(nn.Module):
    shape = (3,)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
        self.squash = ScaledTanh()

    def forward(self, x):
        return self.squash(self.c(torch.sigmoid(self.b(self.squash(self.a(x))))))

    @staticmethod
    def build(units, model, shape):
        hidden = dense(units, range(3), model.a, "a", tanh)
        return dense(units, dense(units, hidden, model.b, "b", sigmoid), model.c, "c", tanh)


class Convolutions(nn.Module):
    shape = (2, 7, 6)

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
        self.b = nn.Conv2d(4, 3, 2, padding=1)
        self.c = nn.Linear(12, 3)

    def forward(self, x):
        x = 1.7159 * (self.a(x) * (2 / 3)).tanh()
        x = functional.avg_pool2d(self.b(x).sigmoid(), 2)
        return self.c(x[:, :, :2, :2].flatten(1))

    @staticmethod
    def build(units, model, shape):
        images = np.arange(math.prod(shape)).reshape(shape).tolist()
        maps = convolution(units, convolution(units, images, model.a, "a", tanh), model.b, "b", sigmoid)
        pooled = [[line[:2] for line in plane[:2]] for plane in averages(units, maps, 2)]
        return dense(units, flat(pooled), model.c, "c", lambda a: (a, 1.0, 0.0))


class Residual(nn.Module):
    """A skip connection, in-place functions, a concatenation, normalisation, a mean and a layer that is used twice."""

    shape = (2, 4, 4)

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.c = nn.Linear(6, 4)
        self.d = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        y = self.b(self.b(x).sigmoid_())
        y += x
        x = self.c(torch.cat([y.mean((2, 3)), x.mean((-2, -1))], 1))
        return self.d(x.tanh()) - 0.5 * x

    @staticmethod
    def build(units, model, shape):
        images = np.arange(math.prod(shape)).reshape(shape).tolist()
        norm = model.norm
        scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).tolist()
        shift = (norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()).tolist()
        first = convolution(units, images, model.a, "a", lambda a: (a, 1.0, 0.0))
        x = [
            [[units.add([(unit, scale[o], None)], shift[o], relu) for unit in line] for line in plane]
            for o, plane in enumerate(first)
        ]
        y = convolution(units, x, model.b, "b", sigmoid)
        y = convolution(units, y, model.b, "b", lambda a: (a, 1.0, 0.0))
        y = [
            [[units.add([(p, 1.0, None), (q, 1.0, None)]) for p, q in zip(l1, l2, strict=True)] for l1, l2 in planes]
            for planes in [list(zip(p1, p2, strict=True)) for p1, p2 in zip(y, x, strict=True)]
        ]
        means = [units.add([(unit, 1 / 16, None) for unit in flat(plane)]) for plane in y + x]
        x = dense(units, means, model.c, "c", lambda a: (a, 1.0, 0.0))

        def plain_tanh(a):
            t = math.tanh(a)
            return t, 1 - t * t, -2 * t * (1 - t * t)

        hidden = [units.add([(unit, 1.0, None)], 0.0, plain_tanh) for unit in x]
        z = dense(units, hidden, model.d, "d", lambda a: (a, 1.0, 0.0))
        return [units.add([(p, 1.0, None), (q, -0.5, None)]) for p, q in zip(z, x, strict=True)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("network", [Perceptron, Convolutions, Residual])
def test_deep_networks_follow_the_papers_formulas_unit_by_unit(network, form):
    torch.manual_seed(1)
    model = network().double().eval()
    x = torch.randn(3, *network.shape, dtype=torch.float64)
    target = torch.randn(3, model(x).shape[1], dtype=torch.float64)
    want = reference(network.build, model, x, target, form == "exact")
    got = diagonal_hessian(model, [(x, target)], "sse", form=form)
    assert list(got) == [name for name in want if name != "norm"]
    for name, second in got.items():
        assert torch.allclose(second, want[name], rtol=1e-10, atol=1e-14), name


@pytest.mark.parametrize("network", [Perceptron, Convolutions, Residual])
def test_the_two_forms_and_the_true_diagonal_are_three_things_in_a_deep_network(network):
    torch.manual_seed(1)
    model = network().double().eval()
    x = torch.randn(3, *network.shape, dtype=torch.float64)
    target = torch.randn(3, model(x).shape[1], dtype=torch.float64)
    exact, levenberg = (diagonal_hessian(model, [(x, target)], "sse", form=form)["a"] for form in FORMS)
    true = true_diagonal(model, "a", x, target, lambda y, d: (y - d).square().sum() / 3)
    assert not torch.allclose(exact, levenberg, rtol=1e-3)
    assert not torch.allclose(exact, true, rtol=1e-3)
    assert bool((levenberg >= 0).all())


class After(nn.Module):
    """A Linear layer, its outputs in a shape, and one operation after it."""

    def __init__(self, shape, operation):
        super().__init__()
        self.linear = nn.Linear(3, math.prod(shape))
        self.shape = shape
        self.operation = operation

    def forward(self, x):
        result = self.operation(self.linear(x).view(len(x), *self.shape))
        return result.flatten(1)


CONSTANTS = {}
GENERATOR = torch.Generator().manual_seed(7)
COLUMN, PLANE, MATRIX, SQUARE, LINES = (
    torch.randn(shape, dtype=torch.float64, generator=GENERATOR)
    for shape in ((2, 1, 1), (5, 4), (4, 3), (3, 5), (2, 6))
)


IMAGE, LINE, VOLUME = (2, 5, 4), (2, 6), (1, 3, 4, 3)
OPERATIONS = {
    "relu": (LINE, functional.relu),
    "leaky relu": (LINE, lambda x: functional.leaky_relu(x, 0.2)),
    "tanh": (LINE, nn.Tanh()),
    "sigmoid": (LINE, nn.Sigmoid()),
    "gelu": (LINE, nn.GELU()),
    "gelu by tanh": (LINE, nn.GELU("tanh")),
    "silu": (LINE, nn.SiLU()),
    "elu": (LINE, nn.ELU(0.7)),
    "selu": (LINE, nn.SELU()),
    "celu": (LINE, nn.CELU()),
    "hardtanh": (LINE, nn.Hardtanh(-0.4, 0.3)),
    "relu6": (LINE, nn.ReLU6()),
    "softplus": (LINE, nn.Softplus(2.0)),
    "mish": (LINE, nn.Mish()),
    "hardswish": (LINE, nn.Hardswish()),
    "softsign": (LINE, nn.Softsign()),
    "logsigmoid": (LINE, nn.LogSigmoid()),
    "tanhshrink": (LINE, nn.Tanhshrink()),
    "prelu": (LINE, nn.PReLU(2).double().requires_grad_(False)),
    "glu": (IMAGE, nn.GLU(1)),
    "identity": (LINE, nn.Identity()),
    "dropout": (LINE, nn.Dropout(0.5)),
    "exp, square and root": (LINE, lambda x: ((x.exp() + 1) ** 2).sqrt()),
    "a constant to the power": (LINE, lambda x: 2**x),
    "one minus": (LINE, lambda x: 1 - x.square()),
    "divided": (LINE, lambda x: 2 / (3 + x.sigmoid()) / 5),
    "itself twice": (LINE, lambda x: x * x),
    "clamped": (LINE, lambda x: x.clamp(-0.2, 0.5)),
    "where": (LINE, lambda x: torch.where(x > 0, x.square(), 0.1 * x)),
    "maximum": (LINE, lambda x: torch.max(x[:, 0], x[:, 1].square())),
    "scaled by constants": (IMAGE, lambda x: x * COLUMN - PLANE),
    "an outer product of parts": (LINE, lambda x: x[:, 0, :, None] * x[:, 1, None, :]),
    "max pooling": (IMAGE, nn.MaxPool2d(2, 1, 1)),
    "max pooling of a line": (LINE, nn.MaxPool1d(3, 2)),
    "max pooling of a volume": (VOLUME, nn.MaxPool3d(2, 1)),
    "average pooling": (IMAGE, nn.AvgPool2d(3, 2, 1)),
    "average pooling, padding not counted": (IMAGE, nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "average pooling, edges kept": (IMAGE, nn.AvgPool2d(2, 2, 0, ceil_mode=True)),
    "average pooling, own divisor": (IMAGE, nn.AvgPool2d(2, 2, divisor_override=3)),
    "average pooling of a line": (LINE, nn.AvgPool1d(3, 2, 1)),
    "average pooling of a volume": (VOLUME, nn.AvgPool3d(2, 1)),
    "adaptive averages": (IMAGE, nn.AdaptiveAvgPool2d((3, 3))),
    "adaptive averages of a line": (LINE, nn.AdaptiveAvgPool1d(4)),
    "adaptive averages of a volume": (VOLUME, nn.AdaptiveAvgPool3d(2)),
    "adaptive maxima": (IMAGE, nn.AdaptiveMaxPool2d((3, 2))),
    "mean over dimensions": (IMAGE, lambda x: x.mean((2, 3))),
    "mean, kept": (IMAGE, lambda x: x.mean(-1, keepdim=True).exp()),
    "sum": (IMAGE, lambda x: x.sum(1)),
    "maximum over a dimension": (IMAGE, lambda x: x.max(dim=2).values),
    "batch normalisation": (IMAGE, nn.BatchNorm2d(2).double().eval()),
    "layer normalisation": (IMAGE, nn.LayerNorm((5, 4)).double()),
    "group normalisation": (IMAGE, nn.GroupNorm(1, 2).double()),
    "softmax": (IMAGE, lambda x: x.softmax(1)),
    "log softmax": (LINE, nn.LogSoftmax(-1)),
    "a constant matrix": (IMAGE, lambda x: x @ MATRIX),
    "a constant matrix from the left": (IMAGE, lambda x: SQUARE @ x),
    "einsum": (IMAGE, lambda x: torch.einsum("ncyx,xk->nkcy", x, MATRIX)),
    "a convolution": (IMAGE, nn.Conv2d(2, 3, 3, 2, 1, 1).double()),
    "a transposed convolution": (IMAGE, nn.ConvTranspose2d(2, 3, 3, 2, 1).double()),
    "padding": (IMAGE, lambda x: functional.pad(x, (1, 2, 0, 1), value=2.0)),
    "reflection": (IMAGE, nn.ReflectionPad2d(2)),
    "shuffled pixels": ((4, 3, 2), nn.PixelShuffle(2)),
    "upsampling": (IMAGE, nn.Upsample(scale_factor=2)),
    "moved and picked": (IMAGE, lambda x: x.permute(0, 3, 1, 2)[:, 1:, :, ::2].transpose(1, -1).contiguous()),
    "cut and joined": (IMAGE, lambda x: torch.cat([*x.chunk(2, 2), x[:, :, :1]], 2).unsqueeze(1).squeeze(1)),
    "stacked": (LINE, lambda x: torch.stack([x, 2 * x], 1).unbind(1)[1].flip(-1).roll(1, -1)),
    "iterated": (LINE, lambda x: torch.stack([row.sin() for row in x])),
    "expanded": (LINE, lambda x: x[:, :, None].expand(-1, -1, 3, -1).repeat(1, 2, 1, 1)),
    "filled": (LINE, lambda x: x.masked_fill(LINES > 0, 5.0)),
    "transposed property": (LINE, lambda x: x.mT),
    "cast": (LINE, lambda x: x.to(torch.float64).double().type_as(x)),
    "counted and branched on": (LINE, lambda x: x.tanh() if x.shape[0] == len(x) and x.dim() == 3 else x),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_operation_between_weights_and_a_sum_of_squares_is_exact(operation):
    torch.manual_seed(2)
    shape, function = OPERATIONS[operation]
    model = After(shape, function).double().eval()
    x = torch.randn(3, 3, dtype=torch.float64)
    target = torch.randn_like(model(x))
    got = diagonal_hessian(model, [(x, target)], "mse", form="exact", targets="linear")["linear"]
    want = true_diagonal(model, "linear", x, target, functional.mse_loss)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    assert bool((got != 0).any())


def changed_in_place(x):
    y = x * 2
    z = y.tanh_()
    y *= 3
    functional.relu(z, inplace=True)
    return y


def hard_sigmoid_in_place(x):
    y = 1 * x
    functional.hardsigmoid(y, inplace=True)
    return y


def into_a_buffer(x):
    total = torch.zeros_like(x[0])
    for part in x:
        total += part
    return x + total


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (changed_in_place, lambda x: ((x * 2).tanh() * 3).relu()),
        (into_a_buffer, lambda x: x + x.sum(0)),
        (hard_sigmoid_in_place, lambda x: functional.relu6(x + 3) / 6),
        (lambda x: x * x.detach(), lambda x: x * CONSTANTS["x"]),
        (lambda x: x + torch.no_grad()(torch.sin)(x), lambda x: x + CONSTANTS["x"].sin()),
        (lambda x: x.softmax(1) if x.sum() > 1e9 else x.tanh(), nn.Tanh()),
        (lambda x: nn.Softmax(None)(x), lambda x: x.softmax(1)),
        (lambda x: torch.add(x, 1, out=None) - 1, lambda x: x),
        (
            nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.3, inplace=True), nn.SiLU(inplace=True)),
            lambda x: functional.silu(x.relu()),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_two_ways_to_write_a_function_agree(function, same):
    torch.manual_seed(2)
    model = After(IMAGE, function).double().eval()
    other = After(IMAGE, same).double().eval()
    other.load_state_dict(model.state_dict())
    x, target = torch.randn(3, 3, dtype=torch.float64), torch.randn(3, 40, dtype=torch.float64)
    CONSTANTS["x"] = model.linear(x).view(3, *IMAGE).detach()
    got, want = (diagonal_hessian(each, [(x, target)], "mse", form="exact")["linear"] for each in (model, other))
    assert torch.allclose(got, want, rtol=1e-9)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_convolutions_of_every_dimension_and_padding_are_exact_under_a_sum_of_squares(dimensions, mode):
    torch.manual_seed(3)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    model = nn.Sequential(kind(4, 6, 3, stride=2, padding=1, groups=2, padding_mode=mode), nn.Tanh(), nn.Flatten())
    model = model.double()
    x = torch.randn(2, 4, *(4, 5, 4)[:dimensions], dtype=torch.float64)
    target = torch.randn_like(model(x))
    got = diagonal_hessian(model, [(x, target)], "mse", form="exact")["0"]
    assert torch.allclose(got, true_diagonal(model, "0", x, target, functional.mse_loss), rtol=1e-9)


def test_layers_below_layers_of_one_unit_are_exact():
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.SiLU(), nn.Linear(1, 1), nn.Softplus(), nn.Linear(1, 3)
    ).double()
    x, target = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    for name, got in diagonal_hessian(model, [(x, target)], "mse", form="exact").items():
        want = true_diagonal(model, name, x, target, functional.mse_loss)
        assert torch.allclose(got, want, rtol=1e-9), name


def test_the_last_layer_is_exact_in_any_network():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 4))
    model = model.double()
    x, target = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.randint(0, 4, (5,))
    for form in FORMS:
        got = diagonal_hessian(model, [(x, target)], "cross_entropy", form=form)["5"]
        assert torch.allclose(got, true_diagonal(model, "5", x, target, functional.cross_entropy), rtol=1e-9)


def test_attention_is_followed():
    torch.manual_seed(6)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
            return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0].flatten(1)

    class ByHand(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))
            for layer, weight in zip((self.q, self.k, self.v), attention.in_proj_weight.chunk(3), strict=True):
                layer.weight.data = weight.data
                layer.bias.data.zero_()
            self.out.load_state_dict(attention.out_proj.state_dict())

        def forward(self, x):
            heads = [layer(x).view(-1, 3, 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v)]
            mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
            return self.out(mixed.transpose(1, 2).flatten(2)).flatten(1)

    model = Attention().double()
    other = ByHand(model.attention).double()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    target = torch.randn_like(model(x))
    assert torch.allclose(model(x), other(x))
    packed = diagonal_hessian(model, [(x, target)], "mse", form="exact", targets=nn.MultiheadAttention)
    apart = diagonal_hessian(other, [(x, target)], "mse", form="exact")
    together = torch.cat([apart[name] for name in "qkv"])
    assert torch.allclose(packed["attention.in_proj_weight"], together, rtol=1e-9)
    true = true_diagonal(other, "out", x, target, functional.mse_loss)
    assert torch.allclose(apart["out"], true, rtol=1e-9)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_attention_with_masks_is_what_torch_computes(batch_first, separate):
    torch.manual_seed(6)
    sizes = {"kdim": 3, "vdim": 5} if separate else {}
    model = nn.MultiheadAttention(4, 2, batch_first=batch_first, **sizes).eval()
    query, key, value = torch.randn(2, 6, 4), torch.randn(2, 7, sizes.get("kdim", 4)), torch.randn(2, 7, 4 + separate)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True
    if not batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    weights = {parameter: name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    for masks in (
        {},
        {"key_padding_mask": padding, "attn_mask": torch.ones(6, 7).tril() == 0},
        {"attn_mask": torch.randn(4, 6, 7), "average_attn_weights": False},
        {"key_padding_mask": padding, "need_weights": False},
    ):
        tape = Tape("test", model, weights, exact=True)
        with tape.recording():
            got, shares = model(query, key, value, **masks)
        want, wanted = model(query, key, value, **masks)
        assert torch.allclose(got, want, atol=1e-6)
        assert (shares is None and wanted is None) or torch.allclose(shares, wanted, atol=1e-6)
        assert set(tape.backward(got, (got.detach(), torch.ones_like(got)))) == set(weights.values())


def test_embeddings_sum_over_their_uses():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Tanh(), nn.Flatten()).double()
    tokens = torch.tensor([[0, 1, 1], [3, 1, 0]])
    target = torch.randn(2, 6, dtype=torch.float64)
    got = diagonal_hessian(model, [(tokens, target)], "mse", form="exact", targets=nn.Embedding)["0"]
    assert torch.allclose(got, true_diagonal(model, "0", tokens, target, functional.mse_loss), rtol=1e-9)
    assert got[2].tolist() == got[4].tolist() == [0, 0]


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x * 2

    @staticmethod
    def backward(context, gradient):
        return gradient * 2


def through_a_view(x):
    part = x[:, 0]
    part += 1
    return x.tanh()


def set_item(x):
    y = torch.zeros_like(x)
    y[:, 0] = x[:, 0]
    return y


def changed_after_use(x):
    y = x * 1
    z = y @ torch.ones(6, 6)
    y += 1
    return z * y


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: torch.cdist(x, x), "must have a rule, got cdist in module 'inner'; write it in operations"),
        (lambda x: torch.fft.rfft(x).real, "got fft_rfft in module 'inner'"),
        (lambda x: torch.from_numpy(x.detach().numpy()) + Doubling.apply(x), "got one before add that torch does not"),
        (Doubling.apply, "got one before flatten that torch does not show"),
        (lambda x: functional.dropout(x, 0.5), "what is dropped must not be drawn, got dropout in training"),
        (lambda x: functional.batch_norm(x, None, None, training=True), "must use stored statistics"),
        (nn.BatchNorm1d(2, track_running_stats=False), "must use stored statistics.* in module 'inner.operation'"),
        (nn.Upsample(scale_factor=2, mode="linear"), "interpolate must have mode 'nearest', got 'linear'"),
        (set_item, "got __setitem__"),
        (through_a_view, "must not be changed through a view of it"),
        (changed_after_use, "what matmul computes with must stay as it is until the pass ends"),
        (lambda x: x * 1j, "numbers must be real, got torch.complex64 from mul"),
        (lambda x: (x * 1).unsqueeze_(0), "a tensor's shape must stay as they are, got unsqueeze in place"),
        (lambda x: torch.einsum("abc,abc,abc->abc", x, x, x), "einsum must have at most two operands"),
        (lambda x: functional.layer_norm(x, (6,), weight=x[0, 0]), "the parameters of layer_norm must be constants"),
        (SelfAttention(6, 2, add_zero_attn=True), "attention must have no extra keys"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(operation, message):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = After(LINE, operation)

        def forward(self, x):
            return self.inner(x)

    model = Outer()
    with pytest.raises(ValueError, match=f"prune.diagonal_hessian: .*{message}"):
        diagonal_hessian(model, [(torch.randn(2, 3), torch.randn(2, 12))], "mse", targets="inner.linear")


def test_what_comes_before_the_selected_weights_may_be_anything():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(4, 2))
    model[1].forward = lambda x: torch.cdist(x, torch.ones(4, 4)) + Doubling.apply(x)
    x, target = torch.randn(5, 3), torch.randn(5, 2)
    with pytest.raises(ValueError, match="got cdist"):
        diagonal_hessian(model, [(x, target)], "mse")
    got = diagonal_hessian(model, [(x, target)], "mse", targets="2")["2"]
    # E = |W h + b - t|^2 / 10: the mean of h^2, for each of two outputs.
    want = model[1](model[0](x)).detach().square().mean(0).expand(2, 4)
    assert torch.allclose(got, want, rtol=1e-5)
