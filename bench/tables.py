"""Writes the tables of the README and the docs from stored results: python -m tersetorch.bench.tables.

A page marks a table's place with <!-- table: NAME --> and <!-- end -->; what stands between is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "docs/results.md")
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

OURS = ("tersetorch csr", "tersetorch csr codebook")
DENSE = ("torch F.linear fp32", "torch mkldnn packed fp32")
SPARSE = ("torch sparse csr", "scipy csr")
HEADLINE_DENSITY = 0.1
HEADLINE_BATCHES = (1, 64)
HEADLINE_SHAPES = ([1024, 1024], [4096, 4096])


def render(text: str) -> str:
    """The page with every marked table made anew from the stored results."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}{match[3]}"

    return MARKED.sub(table, text)


def sizes() -> str:
    """LeNet-300-100 on MNIST beside the paper's row."""
    record = _load("lenet_300_100.json")
    paper, mean, worst = (record[name] for name in ("paper", "mean", "worst"))
    rows = [("Deep Compression (2015)", paper)]
    rows += [(f"tersetorch, mean of {len(record['seeds'])} seeds", mean), ("tersetorch, worst of each", worst)]
    dense_bytes = record["seeds"][0]["bytes_dense"]
    return _markdown(
        ("LeNet-300-100 on MNIST", "error dense", "error compressed", "bytes dense", "bytes", "smaller"),
        (
            (
                name,
                f"{part['error_dense']:.2f} %",
                f"{part['error_compressed']:.2f} %",
                f"{part.get('bytes_dense', dense_bytes):,}",
                f"{part['bytes']:,.0f}",
                f"{part['ratio']:.0f}x",
            )
            for name, part in rows
        ),
    )


def seeds() -> str:
    """Every seed of the reproduction."""
    return _seed_table("lenet_300_100.json")


def sparser_seeds() -> str:
    """Every seed of the sparser plan that was tried before."""
    return _seed_table("lenet_300_100_sparser.json")


def _seed_table(name: str) -> str:
    record = _load(name)
    return _markdown(
        (
            "seed",
            "held-out dense",
            "held-out compressed",
            "test dense",
            "test compressed",
            "bytes",
            "smaller",
            "minutes",
        ),
        (
            (
                row["seed"],
                *(f"{row[part][model]:.2f} %" for part in ("validation", "test") for model in ("dense", "compressed")),
                f"{row['bytes']:,}",
                f"{row['ratio']:.1f}x",
                f"{row['seconds'] / 60:.1f}",
            )
            for row in record["seeds"]
        ),
    )


def layers() -> str:
    """The paper's columns for each layer, and ours of the first seed."""
    record = _load("lenet_300_100.json")
    columns = ("kept", "bits", "huffman_bits", "position_huffman_bits", "file_percent")
    return _markdown(
        ("layer", "", "weights kept %", "bits", "Huffman bits", "position bits", "% of dense"),
        (
            (name, source, *(f"{layer[column]:.3g}" for column in columns))
            for name in record["paper"]["layers"]
            for source, layer in (
                ("paper", record["paper"]["layers"][name]),
                ("ours", record["seeds"][0]["layers"][name]),
            )
        ),
    )


def speeds() -> str:
    """Times of the sparse layer beside its strongest peers, at the headline density and shapes."""
    return _speed_table(
        lambda record: (
            record["density"] == HEADLINE_DENSITY
            and record["batch"] in HEADLINE_BATCHES
            and record["shape"] in HEADLINE_SHAPES
        )
    )


def all_speeds() -> str:
    """Every case that was measured, also where we lose."""
    return _speed_table(lambda record: True)


def machine() -> str:
    """The machine that the stored times were taken on."""
    facts = _load("csr_matmul_1_thread.json")["machine"]
    return f"{facts['cpu']}, {facts['cores']} cores, level `{facts['isa']}`, torch {facts['torch']}.\n"


def _speed_table(wanted: Callable[[dict[str, Any]], bool]) -> str:
    records = [
        record
        for name in ("csr_matmul_1_thread.json", "csr_matmul_2_threads.json")
        for record in _load(name)["records"]
        if wanted(record)
    ]
    cases: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in records:
        case = (record["density"], *record["shape"], record["batch"], record["threads"])
        cases.setdefault(case, {})[record["implementation"]] = record
    return _markdown(
        (
            "layer (out x in)",
            "non-zero",
            "batch",
            "threads",
            "tersetorch ms",
            "with codebook ms",
            "F.linear ms",
            "oneDNN packed ms",
            "torch CSR ms",
            "scipy ms",
            "faster than best dense",
            "than best sparse",
            "of our limit",
        ),
        (_speed_row(case, times) for case, times in sorted(cases.items())),
    )


def _speed_row(case: tuple[Any, ...], records: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    density, rows, columns, batch, threads = case
    times = {name: record["p30_ms"] for name, record in records.items()}
    ours = times[OURS[0]]
    ratios = (f"{min(times[name] for name in peers if name in times) / ours:.1f}x" for peers in (DENSE, SPARSE))
    shown = (f"{times[name]:.3f}" if name in times else "-" for name in (*OURS, *DENSE, *SPARSE))
    limit = f"{100 * records[OURS[0]]['fraction_of_limit']:.0f} %"
    return (f"{rows} x {columns}", f"{100 * density:.0f} %", str(batch), str(threads), *shown, *ratios, limit)


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


def _markdown(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "sizes": sizes,
    "seeds": seeds,
    "sparser_seeds": sparser_seeds,
    "layers": layers,
    "speeds": speeds,
    "all_speeds": all_speeds,
    "machine": machine,
}


def main() -> None:
    """Writes the pages."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
