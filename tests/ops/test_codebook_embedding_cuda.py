"""codebook_embedding on a CUDA device: a real one, or the pretend one of `make test-cuda`."""

import pytest
import torch

from tersetorch import ops

KINDS = ["tensor", "rows", "blocks"]


def problem(rows=10, columns=150, entries=11, kind="tensor"):
    g = torch.Generator().manual_seed(0)
    block = 70 if kind == "blocks" else 0
    tables = {"tensor": 1, "rows": rows, "blocks": max(1, -(-columns // 70))}[kind]
    codes = torch.randint(entries, (rows, columns), dtype=torch.uint8, generator=g)
    tensors = {
        "indices": torch.randint(rows, (3, 4), generator=g),
        "codes": ops.codebook_pack(codes, entries=entries, column_block=block),
        "codebook": torch.randn(tables, entries, generator=g),
    }
    return tensors, {"columns": columns, "column_block": block}


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows,columns,entries", [(1, 1, 1), (5, 33, 4), (10, 150, 16), (3, 131, 200), (4, 0, 3)])
def test_equals_the_cpu(device, rows, columns, entries, kind):
    tensors, sizes = problem(rows, columns, entries, kind)
    for dtype in (torch.float32, torch.bfloat16):
        want = ops.codebook_embedding(**tensors, **sizes, dtype=dtype)
        assert torch.equal(ops.codebook_embedding(**on(device, tensors), **sizes, dtype=dtype).cpu(), want)
    tensors["indices"] = tensors["indices"].int()[0, :1]
    want = ops.codebook_embedding(**tensors, **sizes)
    assert torch.equal(ops.codebook_embedding(**on(device, tensors), **sizes).cpu(), want)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_cpu(device, kind):
    def gradient(tensors):
        codebook = tensors["codebook"].requires_grad_()
        y = ops.codebook_embedding(**tensors, **sizes, padding_idx=2)
        return torch.autograd.grad(y.square().sum(), codebook)[0]

    tensors, sizes = problem(kind=kind)
    torch.testing.assert_close(gradient(on(device, tensors)).cpu(), gradient(tensors), rtol=1e-4, atol=1e-4)


def test_damage_gives_nan(device):
    tensors, sizes = problem()
    tensors["codes"][3, 20] = 255
    tensors["indices"] = torch.tensor([0, 3, 10, -1, 9])
    bad = ops.codebook_embedding(**on(device, tensors), **sizes).cpu().isnan()
    assert bad.all(1).tolist() == bad.any(1).tolist() == [False, True, True, True, False]


def test_accepts_unaligned_memory(emulator):
    tensors, sizes = problem()
    moved = {name: emulator.unaligned(tensor.to("cuda")) for name, tensor in tensors.items()}
    assert torch.equal(ops.codebook_embedding(**moved, **sizes).cpu(), ops.codebook_embedding(**tensors, **sizes))
