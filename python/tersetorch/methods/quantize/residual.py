"""Residual quantisation: each row of a weight is a sum of shared rows, one from each of several codebooks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tersetorch.methods.arguments import check_int
from tersetorch.methods.quantize.kmeans_nd import cluster
from tersetorch.methods.vector_codes import LEAST_RIDGE, VectorCodes, check_moments, check_weight, metric

# How strongly the least squares hold the codebooks back at first, in members of a mean entry: with few members for
# each, the best codebooks for today's codes are so good that no code would change any more. It falls to LEAST_RIDGE.
RIDGE = 0.2
# The noise on the codebooks at first, in standard deviations of their entries; it falls to nothing.
NOISE = 0.65


@torch.no_grad()
def residual_quantize(
    weight: Tensor,
    stages: int = 2,
    entries: int = 256,
    *,
    beam: int = 8,
    refinements: int = 50,
    moments: Tensor | None = None,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> VectorCodes:
    """Approximates each row of a weight by a sum of entries: W[r] ~= sum over t of codebooks[t, 0, :, codes[r, t]].

    Each stage clusters by k-means what the stages before it left, then a beam search picks the rows' codes of all
    stages so far. The refinements at the end anneal: the codebooks become the least-squares ones for the codes, and the
    codes are searched again with codebooks that carry noise, less in each round. The best of all is returned.

    Args:
        weight: float [rows, columns], finite.
        stages: at least 1.
        entries: of each codebook, 1 to 256, at most the rows.
        beam: how many beginnings of a row's codes are followed at a time, at least 1.
        refinements: rounds of the end, at least 0.
        moments: [columns, columns], sum of x x^T of the inputs: the error that is lowered is then that of W x.
        seed: at least 0; the same seed gives the same codes.
        advance: called with 1 after each stage.

    Returns:
        codes uint8 [rows, stages] and codebooks float32 [stages, 1, columns, entries].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, or weight or moments are not finite or have other shapes.

    Source:
        Gong, Liu, Yang, Bourdev, Compressing deep convolutional networks using vector quantization (2014), section
        3.4; Babenko and Lempitsky, Additive quantization (2014), for the beam and the least squares; Martinez et al.,
        LSQ++ (2018), for the noise.
    """
    where = "residual_quantize"
    for name, value, least in (("stages", stages, 1), ("beam", beam, 1), ("refinements", refinements, 0)):
        check_int(where, name, value, least)
    check_int(where, "seed", seed, 0)
    check_weight(where, weight, entries)
    check_moments(where, moments, weight.shape[1])
    points = weight.detach().float()
    root = None if moments is None else metric(where, moments)
    if root is not None:
        points = (points.double() @ root).float()
    codebooks = points.new_empty(0, entries, points.shape[1])
    codes = torch.zeros(len(points), 0, dtype=torch.long, device=points.device)
    for stage in range(stages):
        left = points - _sum(codes, codebooks)
        found = cluster(left[None], entries, seed=seed + stage, restarts=3)
        codebooks = torch.cat([codebooks, found.centres])
        codes = _better(points, codebooks, torch.cat([codes, found.codes.T], 1), beam)
        if advance is not None:
            advance(1)
    if stages > 1:
        codes, codebooks = _anneal(points, codes, codebooks, beam, refinements, seed)
    if root is not None:
        wide = codebooks.double()
        codebooks = torch.linalg.solve_triangular(root, wide.flatten(0, 1), upper=False, left=False).float()
        codebooks = codebooks.view_as(wide)
    return VectorCodes(codes.to(torch.uint8), codebooks.transpose(1, 2)[:, None].contiguous())


def _sum(codes: Tensor, codebooks: Tensor) -> Tensor:
    """What codes [rows, stages] and codebooks [stages, entries, columns] stand for."""
    total = codebooks.new_zeros(len(codes), codebooks.shape[2])
    for stage, book in enumerate(codebooks):
        total += book[codes[:, stage]]
    return total


def _errors(points: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    return (points - _sum(codes, codebooks)).square_().sum(-1)


def _better(points: Tensor, codebooks: Tensor, codes: Tensor, beam: int) -> Tensor:
    """The codes that a beam search finds, or a row's own where they are as good."""
    found = _search(points, codebooks, beam)
    better = _errors(points, found, codebooks) < _errors(points, codes, codebooks)
    return torch.where(better[:, None], found, codes)


def _anneal(
    points: Tensor, codes: Tensor, codebooks: Tensor, beam: int, rounds: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The codes and codebooks with the least error that rounds of least squares and noisy searches meet."""
    generator = torch.Generator().manual_seed(seed)
    members = len(points) / codebooks.shape[1]
    best = codes, codebooks
    least = torch.inf
    for step in range(rounds + 1):
        left = 1 - step / max(1, rounds)
        fitted = _least_squares(points, codes, codebooks, LEAST_RIDGE * members)
        error = float(_errors(points, codes, fitted).sum(dtype=torch.float64))
        if error < least:
            best, least = (codes, fitted), error
        if step == rounds:
            break
        codebooks = _least_squares(points, codes, torch.zeros_like(codebooks), max(LEAST_RIDGE, RIDGE * left) * members)
        noise = torch.randn(codebooks.shape, generator=generator).to(codebooks.device)
        noise *= codebooks.std((0, 1), correction=0) * (NOISE * max(0.0, left - 1 / rounds) ** 0.5)
        codes = _search(points, codebooks + noise, beam)
    return best


def _search(points: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Codes [rows, stages]: of each stage's extensions of the beam's beginnings, the `beam` best go on.

    |x - b - c|^2 = |x - b|^2 - 2 x . c + 2 b . c + |c|^2 for a beginning b: sums of products of entries, made once.
    """
    stages, entries, columns = codebooks.shape
    rows = len(points)
    flat = codebooks.view(-1, columns)
    products = flat @ flat.T
    scores = (products.diagonal() - 2 * (points @ flat.T)).view(rows, stages, entries)
    products = 2 * products
    errors = scores.new_zeros(rows, 1)
    offsets = entries * torch.arange(stages, device=points.device)
    codes = offsets.new_empty(rows, 1, 0)
    for stage in range(stages):
        extended = errors[..., None] + scores[:, stage, None]
        mine = products[:, stage * entries : (stage + 1) * entries]
        for before in range(stage):
            extended += mine[codes[..., before] + offsets[before]]
        kept = min(beam, extended[0].numel())
        best = extended.flatten(1).topk(kept, -1, largest=False)
        errors = best.values
        begun = (best.indices // entries)[..., None].expand(-1, -1, stage)
        codes = torch.cat([codes.gather(1, begun), (best.indices % entries)[..., None]], -1)
    return codes[:, 0]


def _least_squares(points: Tensor, codes: Tensor, anchor: Tensor, ridge: float) -> Tensor:
    """The codebooks whose sums come nearest to points, drawn towards anchor by the ridge."""
    stages, entries, columns = anchor.shape
    places = codes + entries * torch.arange(stages, device=codes.device)
    members = points.new_zeros(len(points), stages * entries, dtype=torch.float64).scatter_(1, places, 1.0)
    left = points.double() - _sum(codes, anchor).double()
    normal = members.T @ members
    normal.diagonal().add_(ridge)
    change = torch.linalg.solve(normal, members.T @ left)
    moved: Tensor = (anchor.double() + change.view(stages, entries, columns)).float()
    return moved
