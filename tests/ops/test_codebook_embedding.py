"""codebook_embedding against rows of the weight that its codes stand for, at the level of this process."""

import pytest
import torch
from torch.nn import functional

from tersetorch import ops

KINDS = ["tensor", "rows", "blocks"]


def problem(rows, columns, entries, kind="tensor", seed=0):
    """Codes as the op takes them, the codebook, the op's other arguments and the dense weight."""
    g = torch.Generator().manual_seed(seed)
    block = 100 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": rows, "blocks": max(1, -(-columns // 100))}[kind]
    codebook = torch.randn(tables, entries, generator=g)
    codes = torch.randint(entries, (rows, columns), dtype=torch.uint8, generator=g)
    packed = ops.codebook_pack(codes, entries=entries, column_block=block)
    sizes = {"columns": columns, "column_block": block}
    return packed, codebook, sizes, ops.codebook_dense(packed, codebook, **sizes)


def some(rows, *shape, dtype=torch.int64, seed=1):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entries", [1, 3, 16, 17, 33, 256])
def test_gives_the_rows_to_the_bit(entries, kind):
    for columns in (0, 1, 64, 129, 257):
        codes, codebook, sizes, dense = problem(23, columns, entries, kind)
        for shape in ((), (1,), (0,), (17,), (3, 2, 20)):
            for index in (torch.int64, torch.int32):
                indices = some(23, *shape, dtype=index)
                for dtype in (torch.float32, torch.bfloat16):
                    want = functional.embedding(indices, dense.to(dtype))
                    for op in (ops.codebook_embedding, ops.codebook_embedding_inference):
                        got = op(indices, codes, codebook, **sizes, dtype=dtype)
                        assert got.dtype == dtype and torch.equal(got, want)


def test_takes_any_strides_and_keeps_what_is_not_finite():
    codes, codebook, sizes, _ = problem(9, 70, 16)
    codebook[0, :2] = torch.tensor([torch.nan, -torch.inf])
    dense = ops.codebook_dense(codes, codebook, **sizes)
    indices = some(9, 4, 6).T[::2]
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.codebook_embedding(indices, codes, codebook, **sizes, dtype=dtype)
        torch.testing.assert_close(got, dense.to(dtype)[indices], rtol=0, atol=0, equal_nan=True)
    spread = codebook.expand(9, 16)[:, ::1]
    assert ops.codebook_embedding(indices, codes, spread, **sizes).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_gradients_and_their_gradients(kind, padding_idx):
    codes, codebook, sizes, _ = problem(9, 130, 5, kind)
    indices = some(9, 4, 50)
    codebook.requires_grad_()
    twin = codebook.detach().clone().requires_grad_()
    plain = ops.codebook_unpack(codes, entries=5, **sizes).long()
    tables = {"tensor": 0, "rows": torch.arange(9)[:, None], "blocks": torch.arange(130)[None] // 100}[kind]
    dense = twin[tables, plain]
    if padding_idx is not None:
        dense = torch.cat([row.detach() if r == padding_idx % 9 else row for r, row in enumerate(dense.split(1))])
    upstream = torch.randn(4, 50, 130, generator=torch.Generator().manual_seed(2))
    grads = []
    for leaf, rows in (
        (codebook, ops.codebook_embedding(indices, codes, codebook, **sizes, padding_idx=padding_idx)),
        (twin, dense[indices]),
    ):
        (first,) = torch.autograd.grad((rows * upstream + rows.pow(3)).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        grads.append((first, second))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-4, atol=1e-1)
    half = ops.codebook_embedding(indices, codes, codebook, **sizes, dtype=torch.bfloat16)
    (of_half,) = torch.autograd.grad(half.float().sum(), codebook)
    assert of_half.dtype == torch.float32 and of_half.sum() == indices.numel() * 130


def test_gradient_of_many_indices_does_not_depend_on_threads():
    for kind in KINDS:
        codes, codebook, sizes, _ = problem(900, 33, 16, kind)
        indices = some(900, 5000)
        upstream = torch.randn(5000, 33, generator=torch.Generator().manual_seed(3))
        codebook.requires_grad_()
        threads, found = torch.get_num_threads(), []
        for count in (1, 3):
            torch.set_num_threads(count)
            y = ops.codebook_embedding(indices, codes, codebook, **sizes)
            found.append(torch.autograd.grad(y, codebook, upstream)[0])
        torch.set_num_threads(threads)
        assert torch.equal(*found)


def test_opcheck_compile_and_export():
    codes, codebook, sizes, _ = problem(7, 130, 16, "blocks")
    indices = some(7, 3, 5)
    codebook.requires_grad_()
    op = torch.ops.tersetorch.codebook_embedding.default
    torch.library.opcheck(op, (indices, codes, codebook, *sizes.values(), 2))
    torch.library.opcheck(op, (indices, codes, codebook, *sizes.values(), -1, torch.bfloat16))
    reduce = torch.ops.tersetorch.codebook_embedding_reduce.default
    torch.library.opcheck(reduce, (torch.randn(3, 5, 130), indices, codes, 2, 16, 100, 2))

    def run(i):
        return ops.codebook_embedding(i, codes, codebook, **sizes, padding_idx=2).relu()

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(indices), run(indices))


@pytest.mark.parametrize("entries", [3, 10, 20, 200])
def test_damage_is_an_error(entries):
    codes, codebook, sizes, _ = problem(40, 200, entries)
    codes[39, 60] = 255
    assert ops.codebook_embedding(some(39, 50), codes, codebook, **sizes).isfinite().all()
    with pytest.raises(RuntimeError, match=rf"codes must lie in \[0, {entries}\), got one outside"):
        ops.codebook_embedding(torch.tensor([3, 39]), codes, codebook, **sizes)
    for index in (40, -1, 2**40):
        indices = some(39, 50)
        indices[31] = index
        for call in (
            lambda: ops.codebook_embedding(indices, codes, codebook, **sizes),  # noqa: B023
            lambda: torch.ops.tersetorch.codebook_embedding_reduce(torch.zeros(50, 200), indices, codes, 1, entries),  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match=rf"indices must lie in \[0, 40\), got {index} at position 31"):
                call()


def test_bad_input_is_refused():
    codes, codebook, sizes, _ = problem(4, 70, 16)
    indices = some(4, 5)
    for arguments, error, sentence in (
        (([1], codes, codebook), TypeError, "indices must be a tensor, got list"),
        ((indices.float(), codes, codebook), TypeError, "indices must be int64 or int32, got torch.float32"),
        ((indices, codes.int(), codebook), TypeError, "codes must be uint8, got torch.int32"),
        ((indices, codes, codebook.double()), TypeError, "codebook must be float32, got torch.float64"),
        ((indices, codes, codebook[0]), ValueError, r"codebook must be \[tables, entries\]"),
        ((indices, codes[:, :32], codebook), ValueError, r"codes must be \[rows, 64\] for 70 columns and 16 entries"),
        ((indices, codes, codebook.expand(3, 16)), ValueError, "codebook must have 1 or 4 tables, got 3"),
    ):
        with pytest.raises(error, match=sentence):
            ops.codebook_embedding(*arguments, **sizes)
    for options, error, sentence in (
        ({"columns": -1}, ValueError, "columns and column_block must be at least 0, got -1 and 0"),
        ({"padding_idx": 4}, ValueError, "padding_idx must be a row of 4, got 4"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32 or bfloat16, got torch.float16"),
    ):
        with pytest.raises(error, match=sentence):
            ops.codebook_embedding(indices, codes, codebook, **{**sizes, **options})
    with pytest.raises(RuntimeError, match="indices must be int64 or int32"):
        ops.codebook_embedding_inference(indices.bool(), codes, codebook, **sizes)
