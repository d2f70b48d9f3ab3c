"""Second derivatives carried backwards through a network, one number for each unit.

For E(y) with y = f(x), f's Jacobian J and the gradient g = dE/dy, each recorded call takes the diagonal h = d2E/dy2
from its output to its inputs as if its outputs did not interact:

    h_x[j] = sum_i J[i, j]^2 h_y[i]  +  sum_i g_y[i] d2y_i/dx_j^2

For x_i = f(a_i) and a_i = sum_j w_ij x_j these are the paper's

    d2E/da_i^2 = f'(a_i)^2 sum_l w_li^2 d2E/da_l^2 + f''(a_i) dE/dx_i        and        d2E/dw_ij^2 = d2E/da_i^2 x_j^2

The second sum is the f'' term: the Levenberg-Marquardt form leaves it out, but for log_softmax, whose curvature belongs
to the loss. A tensor that is used in several places gets the sum over these; a weight, the sum over the connections
that share it.

A call is recorded as Python makes it, so that any control flow is followed; what no rule knows is refused.

Source:
    LeCun, Denker, Solla, Optimal Brain Damage (1990), section 2. Where we differ: the f'' term is added, as
    differentiation gives it; the paper prints a minus.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from tersetorch.methods.parametrization import CompressedWeight

# Where a tensor of the pass keeps its Value.
MARK = "_tersetorch_value"
FIX = "write it in operations that have one, or leave the layers before it out with ignore="

# (dE/dx, d2E/dx2), the first None in the Levenberg-Marquardt form where nothing below needs it.
Pair = tuple[Tensor | None, Tensor]
# What takes the pairs of a call's outputs (None for one that E does not depend on) to those of its inputs.
Backward = Callable[[Sequence[Pair | None]], Sequence[Pair | None]]


class Value:
    """What is known of a tensor that depends on a weight: which version of it was seen, and its pair so far."""

    __slots__ = ("gradient", "second", "tape", "version")

    def __init__(self, tape: Tape, tensor: Tensor) -> None:
        self.tape = tape
        self.version = tensor._version
        self.gradient: Tensor | None = None
        self.second: Tensor | None = None

    def add(self, pair: Pair) -> None:
        """Adds what one use of the tensor contributes."""
        gradient, second = pair
        if gradient is not None:
            self.gradient = gradient if self.gradient is None else self.gradient + gradient
        self.second = second if self.second is None else self.second + second

    def take(self) -> Pair | None:
        """The pair; it is forgotten here, so that the memory is free."""
        pair = None if self.second is None else (self.gradient, self.second)
        self.gradient = self.second = None
        return pair


@dataclass(frozen=True)
class Call:
    """One call of a function that depends on a weight.

    Attributes:
        function: what was called, out of place.
        name: its name without the in-place underscore.
        args: its arguments, float16 and bfloat16 widened.
        kwargs: the same.
        values: what depends on a weight, with the one tensor in args and kwargs that stands for it.
        tape: where it is recorded.
    """

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: dict[Value, Tensor]
    tape: Tape

    def run(self, leaves: Mapping[Value, Tensor]) -> Any:
        """The call with leaves in the place of its tensors, recorded by autograd; without leaves, not recorded."""
        swap = {id(self.values[value]): leaf for value, leaf in leaves.items()}
        with torch.set_grad_enabled(bool(leaves)):
            args, kwargs = _map((self.args, self.kwargs), lambda tensor: swap.get(id(tensor), tensor))
            return self.function(*args, **kwargs)

    def leaves(self) -> dict[Value, Tensor]:
        """Fresh leaves of autograd over the same memory."""
        return {value: tensor.detach().requires_grad_() for value, tensor in self.values.items()}

    def argument(self, name: str, place: int, default: Any) -> Any:
        """An argument by its name or its place."""
        return self.kwargs[name] if name in self.kwargs else self.args[place] if place < len(self.args) else default


# What records a call: its result, and how its pairs go back.
Rule: TypeAlias = Callable[[Call], tuple[Any, Backward]]


class Tape(TorchFunctionMode):
    """Records what a model's forward pass computes from certain weights, then carries second derivatives back.

    Used as `with tape.recording(): output = model(...)`, then tape.backward(output, pair). Tensors that depend on no
    weight of interest cost nothing beyond the forward pass.
    """

    def __init__(
        self, where: str, model: nn.Module, weights: Mapping[Tensor | CompressedWeight, str], exact: bool
    ) -> None:
        """Prepares a pass.

        Args:
            where: what messages begin with.
            model: the network.
            weights: a key of its own for each weight of interest: the parameter, or the parametrization it is the
                output of.
            exact: whether the f'' terms are wanted.
        """
        super().__init__()
        self.where = where
        self.exact = exact
        self._weights = weights
        self._roots: dict[int, Value] = {}
        self._steps: list[tuple[list[Value], list[Value], Backward]] = []
        self._paths = {module: path for path, module in model.named_modules()}
        self._inside: list[str] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While the model runs."""
        self._roots = {id(key): Value(self, key) for key in self._weights if isinstance(key, Tensor)}
        # Hooks of the process, not of the modules, which stay as they are.
        handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def backward(self, output: Tensor, pair: Pair) -> dict[str, Tensor]:
        """The second derivatives of each weight that output depends on, by its name."""
        value = self._value(output)
        if value is None:
            if output.grad_fn is not None:
                raise self._unseen("the loss")
            return {}
        value.add(pair)
        while self._steps:
            inputs, outputs, back = self._steps.pop()
            pairs = [each.take() for each in outputs]
            if all(each is None for each in pairs):
                continue
            for one, found in zip(inputs, back(pairs), strict=True):
                if found is not None:
                    one.add(found)
        roots = {name: self._roots.get(id(key)) for key, name in self._weights.items()}
        return {name: root.second for name, root in roots.items() if root is not None and root.second is not None}

    def refuse(self, problem: str, fix: str) -> ValueError:
        """An error that names the module that is running."""
        place = self._inside[-1] if self._inside else ""
        kind = f"module {place!r}" if place else "the model itself"
        return ValueError(f"{self.where}: {problem} in {kind}; {fix}")

    def _unseen(self, name: str) -> ValueError:
        return self.refuse(
            f"every operation between a weight and the loss must have a rule, got one before {name} that torch does "
            "not show, such as an autograd.Function or a scripted module,",
            FIX,
        )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Records one call."""
        kwargs = {} if kwargs is None else kwargs
        name = _name(func)
        if name in GRAD_MODES:
            return func(*args, **kwargs)
        found = {}
        for tensor in _tensors((args, kwargs)):
            value = self._value(tensor)
            if value is not None:
                found[value] = tensor
            elif tensor.grad_fn is not None:
                raise self._unseen(name)
        if not found or name in CONSTANT or not torch.is_grad_enabled():
            with torch.no_grad():
                return func(*args, **kwargs)
        return self._differentiate(func, name, args, kwargs)

    def _differentiate(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = None
        plain = _out_of_place(func, name, kwargs)
        if plain is not None:
            changed = args[0] if args else kwargs["input"]
            func, name = plain
            kwargs = {key: value for key, value in kwargs.items() if key != "inplace"}
        if name in COMPOSITE:
            if name == "multi_head_attention_forward" and (args[7:8] != (None,) or args[9]):
                raise self.refuse("attention must have no extra keys, got add_bias_kv or add_zero_attn", FIX)
            with self:
                result = COMPOSITE[name](*args, **kwargs)
        elif name in RULES:
            result = self._record(func, name, args, kwargs)
        else:
            if not _writes(name) and kwargs.get("out") is None:
                with torch.no_grad():
                    result = func(*args, **kwargs)
                if _says_nothing_of_values(result):
                    return result
            raise self.refuse(f"every operation between a weight and the loss must have a rule, got {name}", FIX)
        if changed is None:
            return result
        if id(changed) in self._roots or changed.shape != result.shape:
            raise self.refuse(
                f"a weight and a tensor's shape must stay as they are, got {name} in place", "write it out of place"
            )
        with torch.no_grad():
            changed.copy_(result)
        # The tensor is another one from here on.
        value = getattr(result, MARK)
        value.version = changed._version
        setattr(changed, MARK, value)
        return changed.requires_grad_()

    def _record(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wide: dict[int, Tensor] = {}
        values: dict[Value, Tensor] = {}

        def widen(tensor: Tensor) -> Tensor:
            value = self._value(tensor)
            if value is not None and value in values:
                return values[value]
            taken = wide.setdefault(id(tensor), _widened(tensor))
            if value is not None:
                values[value] = taken
            return taken

        args, kwargs = _map((args, kwargs), widen)
        result, back = RULES[name](Call(func, name, args, kwargs, values, self))
        outputs: list[Value] = []

        def publish(tensor: Tensor) -> Tensor:
            shown = tensor.detach()
            if tensor.is_floating_point():
                shown.requires_grad_()
                outputs.append(Value(self, shown))
                setattr(shown, MARK, outputs[-1])
            elif tensor.is_complex():
                raise self.refuse(f"numbers must be real, got {tensor.dtype} from {name}", FIX)
            return shown

        shown = _map(result, publish)
        self._steps.append((list(values), outputs, back))
        return shown

    def _value(self, tensor: Tensor) -> Value | None:
        root = self._roots.get(id(tensor))
        value = getattr(tensor, MARK, None) if root is None else root
        if value is None or value.tape is not self:
            return None
        if value.version != tensor._version:
            raise self.refuse(
                "a tensor that depends on a weight must not be changed through a view of it, got one that was",
                "write the operation out of place",
            )
        return value

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._inside.append(self._paths.get(module, self._inside[-1] if self._inside else ""))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._inside:
            self._inside.pop()
        if module not in self._weights or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return None
        root = self._roots.get(id(module))
        weight = output.detach().requires_grad_()
        if root is None:
            root = self._roots[id(module)] = Value(self, weight)
        root.version = weight._version
        setattr(weight, MARK, root)
        return weight


def _pointwise(call: Call) -> tuple[Any, Backward]:
    """For y = f(x, ...) element by element, with broadcasting: h_x = f'^2 h + f'' g, f' and f'' from autograd."""
    leaves = call.leaves()
    result = call.run(leaves)
    if any(leaf.shape != result.shape for leaf in leaves.values()):
        leaves = {value: tensor.detach().expand(result.shape).requires_grad_() for value, tensor in call.values.items()}
        result = call.run(leaves)
    slopes: list[tuple[Tensor | None, Tensor | None]] = []
    for leaf in leaves.values():
        with torch.enable_grad():
            (first,) = torch.autograd.grad(
                result,
                leaf,
                torch.ones_like(result),
                retain_graph=True,
                create_graph=call.tape.exact,
                allow_unused=True,
            )
            second = None
            if first is not None and first.grad_fn is not None:
                (second,) = torch.autograd.grad(first.sum(), leaf, retain_graph=True, allow_unused=True)
        slopes.append((None if first is None else first.detach(), second))
    shapes = [tensor.shape for tensor in call.values.values()]

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        assert pairs[0] is not None
        gradient, curvature = pairs[0]
        found: list[Pair | None] = []
        for (first, second), shape in zip(slopes, shapes, strict=True):
            if first is None:
                found.append(None)
                continue
            below = first.square() * curvature
            if second is not None and gradient is not None:
                below = below + second * gradient
            passed = None if gradient is None or not call.tape.exact else (first * gradient).sum_to_size(shape)
            found.append((passed, below.sum_to_size(shape)))
        return found

    return result, back


def _copies(call: Call) -> tuple[Any, Backward]:
    """Each output is a sum of some of the inputs, so that J has 0 and 1 only and h goes as a gradient does."""
    return _weighted(call, None)


def _weighted(call: Call, coefficient: Callable[[Tensor], Tensor | float] | None) -> tuple[Any, Backward]:
    """As _copies, with all that is not 0 in a row of J equal to that row's coefficient."""
    leaves = call.leaves()
    result = call.run(leaves)
    outputs = [tensor for tensor in _tensors(result) if tensor.is_floating_point()]

    def through(cotangents: list[Tensor | None]) -> Sequence[Tensor | None]:
        both = zip(outputs, cotangents, strict=True)
        reached = [(y, each) for y, each in both if each is not None and y.requires_grad]
        if not reached:
            return [None] * len(leaves)
        return _gradients(call, [y for y, _ in reached], list(leaves.values()), [each for _, each in reached])

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        seconds = [None if pair is None else pair[1] for pair in pairs]
        if coefficient is not None:
            seconds = [
                None if each is None else each * coefficient(y) for y, each in zip(outputs, seconds, strict=True)
            ]
        found = through(seconds)
        gradients = through([None if pair is None else pair[0] for pair in pairs])
        return [None if each is None else (first, each) for first, each in zip(gradients, found, strict=True)]

    return result, back


def _bilinear(call: Call) -> tuple[Any, Backward]:
    """For y = a sum of products x w (+ b): h_x is what the squared w gives, h_w what the squared x gives, h_b = h."""
    operands = list(_tensors((call.args, {key: each for key, each in call.kwargs.items() if key != "bias"})))
    if call.name == "einsum" and len(operands) > 2:
        raise call.tape.refuse("einsum must have at most two operands, got more", "take two at a time")
    factors = operands[:2] if len(operands) > 1 else []
    unchanged = _Unchanged(call, operands)
    leaves = call.leaves() if call.tape.exact else {}
    result = call.run(leaves)

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        assert pairs[0] is not None
        gradient, curvature = pairs[0]
        unchanged.check()
        swap = {id(tensor): tensor.detach().square() for tensor in factors}
        inputs = [swap.get(id(tensor), tensor.detach()).requires_grad_() for tensor in call.values.values()]
        swap.update({id(tensor): leaf for tensor, leaf in zip(call.values.values(), inputs, strict=True)})
        with torch.enable_grad():
            args, kwargs = _map((call.args, call.kwargs), lambda tensor: swap.get(id(tensor), tensor))
            of_squares = call.function(*args, **kwargs)
        seconds = torch.autograd.grad(of_squares, inputs, curvature)
        firsts: Sequence[Tensor | None] = [None] * len(inputs)
        if gradient is not None and call.tape.exact:
            firsts = _gradients(call, [result], list(leaves.values()), [gradient])
        return list(zip(firsts, seconds, strict=True))

    return result, back


class _Unchanged:
    """Refuses a pass in which a tensor that a rule needs again was changed in place meanwhile."""

    def __init__(self, call: Call, tensors: Sequence[Tensor]) -> None:
        self.call = call
        self.seen = [(tensor, tensor._version) for tensor in tensors]

    def check(self) -> None:
        if any(tensor._version != version for tensor, version in self.seen):
            raise self.error()

    def error(self) -> ValueError:
        return ValueError(
            f"{self.call.tape.where}: what {self.call.name} computes with must stay as it is until the pass ends, got "
            "a tensor that was changed in place; write that operation out of place"
        )


def _gradients(
    call: Call, outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise _Unchanged(call, []).error() from error


def _mean(call: Call) -> tuple[Any, Backward]:
    size = next(iter(call.values.values())).numel()
    return _weighted(call, lambda y: y.numel() / size)


def _average_pool(call: Call) -> tuple[Any, Backward]:
    """1 / (the divisor of each window)."""
    dimensions = int(call.name[-2])
    image = next(iter(call.values.values()))
    blank = image.new_ones(1, 1, *image.shape[-dimensions:])
    with torch.no_grad():
        share = call.function(blank, *call.args[1:], **{k: v for k, v in call.kwargs.items() if k != "input"})
        kernel, stride, padding, ceil = (
            call.argument(name, place, default)
            for place, (name, default) in enumerate(
                (("kernel_size", None), ("stride", None), ("padding", 0), ("ceil_mode", False)), 1
            )
        )
        if dimensions == 1:
            count = functional.avg_pool2d(
                blank[:, :, None],
                (1, _single(kernel)),
                (1, _single(stride or kernel)),
                (0, _single(padding)),
                ceil,
                divisor_override=1,
            )[:, :, 0]
        else:
            pool = functional.avg_pool2d if dimensions == 2 else functional.avg_pool3d
            count = pool(blank, kernel, stride, padding, ceil, divisor_override=1)
        coefficient = torch.where(count > 0, share / count.clamp(min=1), 0)[0, 0]
    return _weighted(call, lambda y: coefficient)


def _single(number: Any) -> int:
    return int(number[0] if isinstance(number, Sequence) else number)


def _adaptive_average_pool(call: Call) -> tuple[Any, Backward]:
    """1 / (the size of each window), windows from floor(o I / O) to ceil((o + 1) I / O)."""
    dimensions = int(call.name[-2])
    image = next(iter(call.values.values()))

    def coefficient(y: Tensor) -> Tensor:
        share = y.new_ones(())
        for inside, outside in zip(image.shape[-dimensions:], y.shape[-dimensions:], strict=True):
            size = [math.ceil((o + 1) * inside / outside) - o * inside // outside for o in range(outside)]
            share = share[..., None] / y.new_tensor(size)
        return share

    return _weighted(call, coefficient)


def _maximum(call: Call) -> tuple[Any, Backward]:
    both = sum(1 for _ in _tensors((call.args, call.kwargs))) > 1
    return _pointwise(call) if both else _copies(call)


def _dropout(call: Call) -> tuple[Any, Backward]:
    training = call.kwargs.get("train", call.argument("training", 2, True))
    if training and call.argument("p", 1, 0.5):
        raise call.tape.refuse(f"what is dropped must not be drawn, got {call.name} in training", "pass training=False")
    return _copies(call)


def _interpolate(call: Call) -> tuple[Any, Backward]:
    mode = call.argument("mode", 3, "nearest")
    if not mode.startswith("nearest"):
        raise call.tape.refuse(f"interpolate must have mode 'nearest', got {mode!r}", "use that mode")
    return _copies(call)


def _cast(call: Call) -> tuple[Any, Backward]:
    """A type or a place: narrower types than float32 are not followed."""
    source = _input(call)
    result = call.run({})
    if result.is_floating_point():
        result = source.detach().to(result.device, torch.promote_types(result.dtype, torch.float32))

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        pair = pairs[0] if pairs else None
        if pair is None:
            return [None] * len(call.values)
        first, second = pair
        moved = None if first is None else first.to(source), second.to(source)
        return [moved if tensor is source else None for tensor in call.values.values()]

    return result, back


def _batch_norm(call: Call) -> tuple[Any, Backward]:
    """In evaluation: one factor for each channel."""
    if call.argument("training", 5, False):
        raise call.tape.refuse(
            "normalisation must use stored statistics, got batch_norm with those of the batch",
            "set track_running_stats=True",
        )
    return _pointwise(call)


def _of_input_only(rule: Rule) -> Rule:
    """Refuses parameters that depend on a weight themselves."""

    def checked(call: Call) -> tuple[Any, Backward]:
        if [id(tensor) for tensor in call.values.values()] != [id(_input(call))]:
            raise call.tape.refuse(
                f"the parameters of {call.name} must be constants, got some that depend on a weight",
                "leave that weight out with ignore=",
            )
        return rule(call)

    return checked


def _input(call: Call) -> Tensor:
    return call.args[0] if call.args else call.kwargs["input"]  # type: ignore[no-any-return]


def _softmax(call: Call) -> tuple[Any, Backward]:
    """For s = softmax(x): ds_i/dx_j = s_i (d_ij - s_j), d2s_i/dx_j^2 = s_i (d_ij - s_j)^2 - s_i s_j (1 - s_j)."""
    result = call.run({})
    dim = _softmax_dimension(call)
    unchanged = _Unchanged(call, [result])

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        assert pairs[0] is not None
        gradient, curvature = pairs[0]
        unchanged.check()
        s = result
        below = s.square() * ((s.square() * curvature).sum(dim, keepdim=True) + curvature * (1 - 2 * s))
        if gradient is None or not call.tape.exact:
            return [(None, below)]
        mean = (s * gradient).sum(dim, keepdim=True)
        return [(s * (gradient - mean), below + s * (2 * s - 1) * (mean - gradient))]

    return result, back


def _log_softmax(call: Call) -> tuple[Any, Backward]:
    """For y = log softmax(x), s = exp y: dy_i/dx_j = d_ij - s_j, d2y_i/dx_j^2 = -s_j (1 - s_j).

    The second is kept in the Levenberg-Marquardt form where it is not negative, as under a negative log-likelihood:
    the two together are the cross-entropy, whose curvature s (1 - s) the form keeps.
    """
    result = call.run({})
    dim = _softmax_dimension(call)
    unchanged = _Unchanged(call, [result])

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        assert pairs[0] is not None
        gradient, curvature = pairs[0]
        unchanged.check()
        s = result.exp()
        below = s.square() * curvature.sum(dim, keepdim=True) + curvature * (1 - 2 * s)
        if gradient is None:
            return [(None, below)]
        total = gradient.sum(dim, keepdim=True)
        below = below - s * (1 - s) * (total if call.tape.exact else total.clamp(max=0))
        return [(gradient - s * total if call.tape.exact else None, below)]

    return result, back


def _softmax_dimension(call: Call) -> int:
    dim = call.argument("dim", 1, None)
    if dim is None:  # torch's choice
        return 0 if _input(call).dim() in (0, 1, 3) else 1
    return int(dim)


def _layer_norm(call: Call) -> tuple[Any, Backward]:
    """For z_i = (x_i - mean) / d and A_ij = d_ij - 1/n - z_i z_j / n: the derivatives of z_i by x_j are these.

    dz_i/dx_j = A_ij / d and d2z_i/dx_j^2 = -(2 z_j A_ij + z_i A_jj) / (n d^2).
    """
    result = call.run({})
    x = _input(call).detach()
    shape = call.argument("normalized_shape", 1, None)
    dims = list(range(-len(shape), 0))
    weight, epsilon = call.argument("weight", 2, None), call.argument("eps", 4, 1e-5)
    n = math.prod(shape)
    deviation = (x.var(dims, correction=0, keepdim=True) + epsilon).sqrt()
    z = (x - x.mean(dims, keepdim=True)) / deviation

    def back(pairs: Sequence[Pair | None]) -> list[Pair | None]:
        assert pairs[0] is not None
        gradient, curvature = pairs[0]
        h = curvature if weight is None else curvature * weight.square()
        h0, h1, h2 = ((h * z**power).sum(dims, keepdim=True) for power in range(3))
        below = h * (1 - 2 / n - 2 * z.square() / n) + (h0 + 2 * z * h1 + z.square() * h2) / n**2
        passed = None
        if gradient is not None and call.tape.exact:
            g = gradient if weight is None else gradient * weight
            g0, g1 = ((g * z**power).sum(dims, keepdim=True) for power in range(2))
            passed = (g - g0 / n - z * g1 / n) / deviation
            below = below - (2 * z * passed * deviation + g1 * (1 - 1 / n - z.square() / n)) / n
        return [(passed, below / deviation.square())]

    return result, back


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What scaled_dot_product_attention computes, in operations that have rules."""
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(repeats, -3) for each in (key, value))
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return functional.dropout(scores.softmax(-1), dropout_p) @ value


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What multi_head_attention_forward computes, in operations that have rules.

    Arguments that no nn.MultiheadAttention passes, and extra keys and values, are not looked at.
    """
    batched = query.dim() == 3
    inputs = [each if batched else each.unsqueeze(1) for each in (query, key, value)]
    weights: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if in_proj_weight is not None and not use_separate_proj_weight:
        weights = in_proj_weight.chunk(3)
    biases: Sequence[Tensor | None] = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
    heads = []
    for each, weight, bias in zip(inputs, weights, biases, strict=True):
        assert weight is not None
        projected = functional.linear(each, weight, bias)
        heads.append(projected.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3))
    mask = _additive(attn_mask, query)
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, query)
        assert padding is not None
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        mask = padding if mask is None else mask + padding
    q, k, v = heads
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    shares = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout_p, training)
    result = functional.linear((shares @ v).permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    seen = None
    if need_weights:
        seen = shares.mean(1) if average_attn_weights else shares
        seen = seen if batched else seen.squeeze(0)
    return result if batched else result.squeeze(1), seen


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill(mask, -math.inf)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """What group_norm computes, in operations that have rules."""
    grouped = x.reshape(x.shape[0], num_groups, -1)
    result = functional.layer_norm(grouped, grouped.shape[2:], eps=eps).reshape(x.shape)
    channels = [1, -1] + [1] * (x.dim() - 2)
    if weight is not None:
        result = result * weight.view(channels)
    return result if bias is None else result + bias.view(channels)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    """What glu computes, in operations that have rules."""
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", repr(func))
    if name == "__get__":  # a property, such as Tensor.T
        return str(getattr(getattr(func, "__self__", None), "__name__", name))
    return ALIASES.get(name, name)


def _out_of_place(
    func: Callable[..., Any], name: str, kwargs: Mapping[str, Any]
) -> tuple[Callable[..., Any], str] | None:
    """The function that gives as its result what func writes into its first argument, or None if func does not."""
    if kwargs.get("inplace") is True:
        return func, name
    plain = INPLACE.get(name, name[:-1]) if _writes(name) else None
    if plain is None or (plain not in RULES and plain not in COMPOSITE):
        return None
    for room in (torch.Tensor, functional, torch):
        if hasattr(room, plain):
            return getattr(room, plain), plain
    return None


def _writes(name: str) -> bool:
    """Whether a method changes its tensor."""
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in READS)
    return name.endswith("_")


def _says_nothing_of_values(result: Any) -> bool:
    """Whether result is numbers, flags, shapes and the like, which autograd does not follow either."""
    if isinstance(result, Tensor):
        return result.dtype in INTEGERS
    if isinstance(result, list | tuple):
        return all(_says_nothing_of_values(each) for each in result)
    return isinstance(result, PLAIN)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for each in tree.values():
            yield from _tensors(each)
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _tensors(each)


def _map(tree: Any, rule: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return rule(tree)
    if isinstance(tree, dict):
        return {key: _map(each, rule) for key, each in tree.items()}
    if isinstance(tree, list | tuple):
        mapped = [_map(each, rule) for each in tree]
        if isinstance(tree, torch.Size):
            return tree
        if hasattr(tree, "n_sequence_fields"):  # such as what max(dim) returns
            return type(tree)(mapped)
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    return tree


POINTWISE = (
    "abs add addcdiv addcmul arctan asinh atan atanh ceil celu clamp clamp_max clamp_min clip cos cosh div divide "
    "elu erf erfc exp exp2 expm1 floor gelu hardshrink hardswish hardtanh leaky_relu lerp log log10 "
    "log1p log2 log_sigmoid maximum minimum mish mul multiply nan_to_num neg negative pow prelu reciprocal relu "
    "relu6 round rsqrt rsub selu sigmoid sign silu sin sinh softplus softshrink softsign sqrt square sub subtract "
    "tan tanh tanhshrink threshold true_divide where"
)
COPIES = (
    "H T __getitem__ adaptive_max_pool1d adaptive_max_pool1d_with_indices adaptive_max_pool2d "
    "adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices alias broadcast_to cat "
    "channel_shuffle chunk clone concat concatenate contiguous cumsum diagonal dstack embedding expand expand_as "
    "flatten flip fliplr flipud fold gather hstack index_select mH mT masked_fill max_pool1d "
    "max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices moveaxis "
    "movedim narrow pad permute pixel_shuffle pixel_unshuffle ravel repeat repeat_interleave reshape reshape_as "
    "roll rot90 select split split_with_sizes squeeze stack sum swapaxes swapdims t take_along_dim tensor_split "
    "tile transpose tril triu unbind unflatten unfold unsqueeze view view_as vstack"
)
BILINEAR = "linear matmul mm bmm mv dot einsum conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"

RULES: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE.split(), _pointwise),
    **dict.fromkeys(COPIES.split(), _copies),
    **dict.fromkeys(BILINEAR.split(), _bilinear),
    **{f"avg_pool{dimensions}d": _average_pool for dimensions in (1, 2, 3)},
    **{f"adaptive_avg_pool{dimensions}d": _adaptive_average_pool for dimensions in (1, 2, 3)},
    **dict.fromkeys(["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"], _dropout),
    **dict.fromkeys(["to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"], _cast),
    "mean": _mean,
    "max": _maximum,
    "min": _maximum,
    "interpolate": _interpolate,
    "batch_norm": _of_input_only(_batch_norm),
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "layer_norm": _of_input_only(_layer_norm),
}
# Written out in calls that have rules.
COMPOSITE: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "group_norm": _group_norm,
    "glu": _glu,
    "hardsigmoid": lambda input, inplace=False: functional.relu6(input + 3) / 6,  # torch has no second derivative
    "__iter__": lambda tensor: iter(tensor.unbind(0)),
}

OPERATORS = "add sub mul div truediv pow neg matmul abs radd rsub rmul rdiv rtruediv rpow rmatmul"
ALIASES = {f"__{name}__": name.removeprefix("r").replace("truediv", "div") for name in OPERATORS.split()}
INPLACE = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div", "__ipow__": "pow"}
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
READS = ("__int__", "__index__", "__invert__")
GRAD_MODES = {"_set_grad_enabled", "set_grad_enabled"}
# What autograd does not follow either, and what only looks at a tensor's shape and type.
CONSTANT = {"detach", "data", "requires_grad_", "retain_grad"}
CONSTANT |= {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")}
CONSTANT |= {f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor")}
