"""Product quantisation: each block of a weight's columns has its own few sub-vectors, which its rows share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from tersetorch.methods.arguments import check_flag, check_int
from tersetorch.methods.quantize.kmeans_nd import cluster, refine
from tersetorch.methods.vector_codes import (
    VectorCodes,
    check_entries,
    check_moments,
    check_weight,
    metric,
)

# Sub-vectors that a codebook shared by all segments is clustered from at first.
SAMPLE = 1 << 16


def product_quantize(
    weight: Tensor,
    entries: int = 256,
    *,
    segments: int | None = None,
    sub_vector: int | None = None,
    shared: bool = False,
    moments: Tensor | None = None,
    seed: int = 0,
    advance: Callable[[int], object] | None = None,
) -> VectorCodes:
    """Approximates a weight by few sub-vectors: W[r, segment s] ~= codebooks[0, s, :, codes[r, s]].

    The columns are cut into segments of sub_vector columns, the last padded with zeros; in each the rows' parts are
    clustered by k-means into `entries` clusters. One code takes log2(entries) bits for sub_vector weights.

    Args:
        weight: float [rows, columns], finite.
        entries: centres of each segment, 1 to 256, at most the rows.
        segments: how many parts the columns are cut into; or
        sub_vector: how many columns each part has. One of the two; 4 columns where both are left out.
        shared: whether all segments share one codebook, which then costs next to nothing.
        moments: [columns, columns], sum of x x^T of the inputs: the error that is lowered is then that of W x within
            each segment, instead of that of W.
        seed: at least 0; the same seed gives the same codes.
        advance: called with the number of segments that are done.

    Returns:
        codes uint8 [rows, segments] and codebooks float32 [1, segments or 1, sub_vector, entries].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a number is outside its range, weight or moments are not finite or have other shapes than named
            here, both or neither of segments and sub_vector fit, or shared is asked for with moments.

    Source:
        Gong, Liu, Yang, Bourdev, Compressing deep convolutional networks using vector quantization (2014), section
        3.3; Jegou, Douze, Schmid, Product quantization for nearest neighbor search (2011).
    """
    where = "product_quantize"
    check_flag(where, "shared", shared)
    check_int(where, "seed", seed, 0)
    check_weight(where, weight, 1)
    rows, columns = weight.shape
    width = segment_width(where, columns, segments, sub_vector)
    count = -(-columns // width)
    check_entries(where, entries, rows * (count if shared else 1))
    check_moments(where, moments, columns)
    if shared and moments is not None:
        raise ValueError(f"{where}: shared must be False where moments are given, got both; leave one of them out")
    padded = functional.pad(weight.detach().float(), (0, count * width - columns))
    points = padded.view(rows, count, width).transpose(0, 1).contiguous()
    if shared:
        return _share(points.reshape(1, -1, width), rows, entries, seed, advance)
    if moments is None:
        found = cluster(points, entries, seed=seed, advance=advance)
        centres = found.centres
    else:
        blocks = functional.pad(moments.double(), (0, count * width - columns) * 2)
        roots = metric(where, blocks.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        found = cluster((points.double() @ roots).float(), entries, seed=seed, advance=advance)
        centres = torch.linalg.solve_triangular(roots, found.centres.double(), upper=False, left=False).float()
    return VectorCodes(found.codes.T.to(torch.uint8).contiguous(), centres.transpose(1, 2).contiguous()[None])


def segment_width(where: str, columns: int, segments: int | None, sub_vector: int | None) -> int:
    """Columns of a segment.

    Raises:
        TypeError, ValueError: as product_quantize says.
    """
    if segments is not None and sub_vector is not None:
        raise ValueError(f"{where}: segments must be left out where sub_vector is given, got both; pass one of them")
    if segments is None:
        width = 4 if sub_vector is None else sub_vector
        check_int(where, "sub_vector", width, 1, columns)
        return width
    check_int(where, "segments", segments, 1, columns)
    width = -(-columns // segments)
    if -(-columns // width) != segments:
        raise ValueError(
            f"{where}: segments must cut {columns} columns into parts of one width, got {segments}, which leaves some "
            f"empty at {width} columns each; pass {-(-columns // width)} or sub_vector"
        )
    return width


def _share(points: Tensor, rows: int, entries: int, seed: int, advance: Callable[[int], object] | None) -> VectorCodes:
    sample = points
    if points.shape[1] > SAMPLE:
        chosen = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(seed))[:SAMPLE]
        sample = points[:, chosen.to(points.device)]
    start = cluster(sample, entries, seed=seed).centres
    found = refine(points, start, 10)
    count = points.shape[1] // rows
    if advance is not None:
        advance(count)
    codes = found.codes.view(count, rows).T.to(torch.uint8).contiguous()
    return VectorCodes(codes, found.centres.transpose(1, 2).contiguous()[None])
