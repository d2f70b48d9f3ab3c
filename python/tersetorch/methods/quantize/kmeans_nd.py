"""k-means of short vectors: many clusterings of the same shape at a time, as product quantisation asks for."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tersetorch import _native

# Distances that are in memory at a time.
BLOCK = 1 << 21
# Points of so few numbers are clustered natively, a problem at a time; wider ones by GEMM, as many as BLOCK allows.
NATIVE_WIDTH = 32

# The fewer the clusters, the more an unlucky draw costs and the less another try: rounds of exchange, and restarts from
# so many clusters on.
EXCHANGES, MOST_EXCHANGES, FEW_EXCHANGES = 12, 24, 384
RESTARTS = ((128, 1), (32, 3), (12, 8), (6, 12), (1, 32))

# Codes, centres and errors of one problem.
_Found = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float64]]

# Lloyd's iteration stops where a round lowers the error by less than this part of it.
LEAST_GAIN = 1e-5


@dataclass(frozen=True)
class Clusters:
    """Partitions of points, one for each problem.

    Attributes:
        codes: int64 [problems, points], the cluster of each point.
        centres: float32 [problems, clusters, width].
        errors: float64 [problems], the sum of the squared distances of the points to their centres.
    """

    codes: Tensor
    centres: Tensor
    errors: Tensor


class _State(NamedTuple):
    codes: Tensor
    centres: Tensor
    distances: Tensor  # float32 [problems, points], squared, to the centre
    errors: Tensor

    def where(self, better: Tensor, other: _State) -> _State:
        """The other's problems where better [problems] says so, ours elsewhere."""
        pairs = zip(self, other, strict=True)
        return _State(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), b, a) for a, b in pairs))


@torch.no_grad()
def cluster(
    points: Tensor,
    clusters: int,
    *,
    seed: int = 0,
    iterations: int = 50,
    exchanges: int | None = None,
    restarts: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> Clusters:
    """Parts the points of each problem into `clusters` clusters with a small sum of squared distances to their means.

    k-means++ draws the initial centres, Lloyd's iteration moves them, and exchanges then repair what the draw did
    badly: the centres whose points have nearly as good a second choice go to where the error is greatest, and that
    stays where it lowers the error after some rounds of Lloyd. A cluster without members takes the point that lies
    farthest from its centre. Of several restarts each problem keeps its best. The same seed gives the same result, and
    a problem's result depends neither on the problems beside it nor on the number of threads.

    Args:
        points: finite [problems, points, width], taken as float32; sums are float64.
        clusters: at least 1.
        seed: of the draws.
        iterations: most rounds of Lloyd's iteration after the draw, and again at the end.
        exchanges: most rounds of exchange; 12, or up to 24 for few clusters, where left out.
        restarts: at least 1; 32 below 6 clusters, 12 below 12, 8 below 32, 3 below 128, else 1 where left out.
        advance: called with the number of problems that are done, for a progress bar.

    Source:
        Arthur and Vassilvitskii, k-means++ (2007); the exchange is the one of Fritzke, The k-means-u* algorithm
        (2017), with several centres at a time.
    """
    problems, count, _ = points.shape
    if exchanges is None:
        exchanges = max(EXCHANGES, min(MOST_EXCHANGES, FEW_EXCHANGES // clusters))
    if restarts is None:
        restarts = next((tries for fewest, tries in RESTARTS if clusters >= fewest))
    points = points.float()
    middle = points.mean(1, keepdim=True, dtype=torch.float64).float()
    points = points - middle
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(restarts, problems, clusters, generator=generator, dtype=torch.float64).to(points.device)
    if _is_native(points, clusters):
        around, attempts = points.numpy(), draws.numpy()

        def solve(problem: int) -> _Found:
            only = slice(problem, problem + 1)
            tries = (_native.vector_kmeans(around[only], each[only], iterations, exchanges) for each in attempts)
            return min(tries, key=lambda found: float(found[2][0]))

        found = _side_by_side(solve, problems, advance)
        return Clusters(found.codes, found.centres + middle, found.errors)
    step = max(1, BLOCK // max(1, count * clusters))
    parts: list[_State] = []
    for first in range(0, problems, step):
        part = points[first : first + step]
        best = None
        for attempt in range(restarts):
            state = _cluster(part, draws[attempt, first : first + step], iterations, exchanges)
            best = state if best is None else best.where(state.errors < best.errors, state)
        assert best is not None
        parts.append(best)
        if advance is not None:
            advance(len(part))
    codes, centres, _, errors = (torch.cat(each) for each in zip(*parts, strict=True))
    return Clusters(codes, centres + middle, errors)


@torch.no_grad()
def refine(points: Tensor, centres: Tensor, iterations: int) -> Clusters:
    """Lloyd's iteration from these centres [problems, clusters, width], at most so many rounds."""
    if _is_native(points, centres.shape[1]):
        around, start = points.detach().float().numpy(), centres.detach().float().numpy()

        def solve(problem: int) -> _Found:
            only = slice(problem, problem + 1)
            return _native.vector_lloyd(around[only], start[only], iterations)

        return _side_by_side(solve, len(points))
    state = _lloyd(points.float(), centres, iterations)
    return Clusters(state.codes, state.centres, state.errors)


def _is_native(points: Tensor, clusters: int) -> bool:
    return points.device.type == "cpu" and 1 <= points.shape[2] <= NATIVE_WIDTH and clusters <= points.shape[1]


def _side_by_side(
    solve: Callable[[int], _Found], problems: int, advance: Callable[[int], object] | None = None
) -> Clusters:
    """What solve finds for each problem; torch's threads share them, and none changes what another finds."""
    found = []
    with ThreadPoolExecutor(min(problems, torch.get_num_threads())) as pool:
        for each in pool.map(solve, range(problems)):
            found.append(each)
            if advance is not None:
                advance(1)
    codes, centres, errors = (torch.from_numpy(np.concatenate(part)) for part in zip(*found, strict=True))
    return Clusters(codes.long(), centres, errors)


def nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point and the squared distance to it, both [problems, points]; blocks of GEMM."""
    half = centres.double().square().sum(-1).float()[:, None] / 2
    step = max(1, BLOCK // max(1, len(points) * centres.shape[1]))
    transposed = centres.transpose(1, 2)
    found = [
        torch.baddbmm(half, points[:, first : first + step], transposed, alpha=-1).min(-1)
        for first in range(0, points.shape[1], step)
    ]
    codes = torch.cat([each.indices for each in found], 1)
    own = centres.gather(1, codes[..., None].expand(-1, -1, centres.shape[2]))
    return codes, (points - own).square_().sum(-1)


def means(points: Tensor, codes: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """The mean float32 [problems, clusters, width] and the size float64 [problems, clusters] of each cluster."""
    problems, _, width = points.shape
    flat = _flat(codes, clusters)
    sums = points.new_zeros(problems * clusters, width, dtype=torch.float64)
    sums.index_add_(0, flat, points.reshape(-1, width).double())
    sizes = torch.bincount(flat, minlength=problems * clusters).double()
    centres = (sums / sizes.clamp(min=1)[:, None]).float()
    return centres.view(problems, clusters, width), sizes.view(problems, clusters)


def _flat(codes: Tensor, clusters: int) -> Tensor:
    return (codes + clusters * torch.arange(len(codes), device=codes.device)[:, None]).flatten()


def _cluster(points: Tensor, draws: Tensor, iterations: int, exchanges: int) -> _State:
    state = _lloyd(points, _draw(points, draws), iterations)
    clusters = state.centres.shape[1]
    moved = max(1, clusters // 6)
    for _ in range(exchanges if clusters > 1 else 0):
        state, gained = _exchange(points, state, moved)
        if not gained:
            if moved == 1:
                break
            moved = max(1, moved // 3)
    return state


def _draw(points: Tensor, draws: Tensor) -> Tensor:
    """Initial centres [problems, clusters, width]: each is a point drawn in proportion to its error so far."""
    problems, count, width = points.shape
    clusters = draws.shape[1]
    first = (draws[:, 0] * count).long().clamp(max=count - 1)
    every = torch.arange(problems, device=points.device)
    centres = points.new_empty(problems, clusters, width)
    centres[:, 0] = points[every, first]
    distances = (points - centres[:, :1]).square_().sum(-1)
    for c in range(1, clusters):
        below = distances.double().cumsum_(-1)
        wanted = below[:, -1:] * draws[:, c : c + 1]
        chosen = torch.searchsorted(below, wanted, right=True).clamp(max=count - 1)
        centres[:, c] = points[every, chosen[:, 0]]
        distances = torch.minimum(distances, (points - centres[:, c : c + 1]).square_().sum(-1))
    return centres


def _lloyd(points: Tensor, centres: Tensor, iterations: int) -> _State:
    codes, distances = nearest(points, centres)
    state = _State(codes, centres, distances, distances.sum(-1, dtype=torch.float64))
    for _ in range(iterations):
        centres = _filled(points, state)
        codes, distances = nearest(points, centres)
        errors = distances.sum(-1, dtype=torch.float64)
        before = state.errors
        # Rounding may raise the error once nothing moves any more.
        state = state.where(errors < before, _State(codes, centres, distances, errors))
        if bool((before - errors <= LEAST_GAIN * before).all()):
            break
    return state


def _filled(points: Tensor, state: _State) -> Tensor:
    """The means of the clusters; those without members become the points farthest from their centres."""
    clusters = state.centres.shape[1]
    centres, sizes = means(points, state.codes, clusters)
    empty = sizes == 0
    most = min(int(empty.sum(-1).max()), points.shape[1])
    if most:
        farthest = state.distances.topk(most, -1).indices
        place = (empty.cumsum(-1) - 1).clamp(0, most - 1)
        chosen = points.gather(1, farthest.gather(1, place)[..., None].expand(-1, -1, points.shape[2]))
        centres = torch.where(empty[..., None], chosen, centres)
    return centres


def _exchange(points: Tensor, state: _State, moved: int) -> tuple[_State, bool]:
    """Moves the centres that are missed least to where the error is greatest; kept where that helps."""
    clusters = state.centres.shape[1]
    flat = _flat(state.codes, clusters)
    errors = torch.bincount(flat, state.distances.flatten().double(), len(points) * clusters).view(-1, clusters)
    least = _losses(points, state).topk(moved, -1, largest=False).indices
    # A centre that moves away is no place to move to.
    greatest = errors.scatter(1, least, -1).topk(moved, -1).indices
    # Next to the centre, towards the member that lies farthest from it.
    order = state.distances.sort(-1).indices
    farthest = torch.zeros_like(errors, dtype=torch.long).scatter_(1, state.codes.gather(1, order), order)
    width = points.shape[2]
    member = points.gather(1, farthest.gather(1, greatest)[..., None].expand(-1, -1, width))
    target = state.centres.gather(1, greatest[..., None].expand(-1, -1, width))
    centres = state.centres.scatter(1, least[..., None].expand(-1, -1, width), (target + member) / 2)
    tried = _lloyd(points, centres, 12)
    better = tried.errors < state.errors * (1 - LEAST_GAIN)
    return state.where(better, tried), bool(better.any())


def _losses(points: Tensor, state: _State) -> Tensor:
    """How much the error grows without a centre, float64 [problems, clusters]: second distances less first."""
    half = state.centres.double().square().sum(-1).float()[:, None] / 2
    clusters = state.centres.shape[1]
    step = max(1, BLOCK // max(1, len(points) * clusters))
    growth = []
    for first in range(0, points.shape[1], step):
        part = points[:, first : first + step]
        scores = torch.baddbmm(half, part, state.centres.transpose(1, 2), alpha=-1)
        own = state.codes[:, first : first + step, None]
        best = scores.gather(-1, own)
        growth.append(scores.scatter_(-1, own, torch.inf).amin(-1) - best[..., 0])
    lost = torch.cat(growth, 1).clamp_(min=0).flatten().double() * 2
    return torch.bincount(_flat(state.codes, clusters), lost, len(points) * clusters).view(-1, clusters)
