"""codebook_matmul on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import ops

KINDS = ["tensor", "rows", "blocks"]


def problem(rows=10, columns=150, batch=9, entries=11, kind="tensor", dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    block = 70 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": rows, "blocks": max(1, -(-columns // 70))}[kind]
    codes = torch.randint(entries, (rows, columns), dtype=torch.uint8, generator=g)
    return {
        "x": torch.randn(batch, columns, generator=g).to(dtype),
        "codes": ops.codebook_pack(codes, entries=entries, column_block=block),
        "codebook": torch.randn(tables, entries, generator=g),
        "bias": torch.randn(rows, generator=g),
        "column_block": block,
    }


def on(device, tensors):
    return {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}


@pytest.mark.parametrize("mode", ops.CODEBOOK_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "rows,columns,batch,entries",
    [(1, 1, 1, 1), (5, 33, 8, 4), (10, 150, 9, 16), (3, 131, 17, 200), (4, 0, 2, 3), (4, 9, 0, 3)],
)
def test_equals_the_cpu(device, rows, columns, batch, entries, kind, mode):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = problem(rows, columns, batch, entries, kind, dtype)
        for relu in (False, True):
            want = ops.codebook_matmul(**tensors, mode=mode, relu=relu)
            got = ops.codebook_matmul(**on(device, tensors), mode=mode, relu=relu).cpu()
            exact = {"rtol": 0, "atol": 0} if mode == "int8" else {}
            torch.testing.assert_close(got, want, **exact)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_cpu(device, kind):
    def gradients(tensors):
        leaves = [tensors[name].requires_grad_() for name in ("x", "codebook", "bias")]
        return torch.autograd.grad(ops.codebook_matmul(**tensors, relu=True).square().sum(), leaves)

    tensors = problem(kind=kind)
    for got, want in zip(gradients(on(device, tensors)), gradients(tensors), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4)


def test_a_code_outside_its_table_gives_nan(device):
    tensors = problem()
    tensors["codes"][3, 20] = 255
    for mode in ops.CODEBOOK_MODES:
        bad = ops.codebook_matmul_inference(*on(device, tensors).values(), mode).cpu().isnan()
        assert bad[:, 3].all() and bad.sum() == 9
    moved = on(device, tensors)
    assert ops.codebook_dense(moved["codes"], moved["codebook"], columns=150).cpu().isnan().any(
        1
    ).nonzero().tolist() == [[3]]


def test_accepts_unaligned_memory(emulator):
    tensors = problem()
    moved = {n: emulator.unaligned(t.to("cuda")) if isinstance(t, torch.Tensor) else t for n, t in tensors.items()}
    for mode in ops.CODEBOOK_MODES:
        torch.testing.assert_close(
            ops.codebook_matmul(**moved, mode=mode).cpu(), ops.codebook_matmul(**tensors, mode=mode)
        )
