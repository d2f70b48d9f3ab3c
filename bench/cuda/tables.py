"""Tables of what was measured on a GPU, for docs/gpu.md."""

from __future__ import annotations

from typing import Any

from .problems import FAMILIES, Family

Record = dict[str, Any]
TITLES: dict[Family, str] = {
    "codebook": "Weights shared by values",
    "sparse": "Sparse weights, by density",
    "product": "Weights of shared sub-vectors",
    "conv": "Sparse convolutions, by density",
    "xnor": "Signs",
    "xnor_conv": "Convolutions of signs",
    "codebook_conv": "Convolutions with weights shared by values",
    "embedding": "Embeddings with weights shared by values; a batch is of look-ups",
    "flat": "Flattened convolutions",
    "fixed": "Products of fixed-point numbers",
    "rounding": "Rounding to fixed point",
}


def machines(*stored: Record) -> str:
    """A line for each GPU: what torch reaches on it."""
    lines = []
    for facts, rates in ((one["machine"], one["machine"]["rates"]) for one in stored):
        gops = ", ".join(f"{rate / 1e3:,.0f} TOP/s {mode}" for mode, rate in rates["gops"].items())
        lines.append(
            f"- {rates['gpu']}, CUDA {rates['cuda']}, torch {facts['torch']}: copies {rates['copy_gbytes_per_s']:,.0f} "
            f"GB/s (read and written), products of large matrices {gops}, an all but empty kernel in a graph "
            f"{1e3 * rates['launch_ms']:.2f} us\n"
        )
    return "".join(lines)


def speeds(stored: Record, family: Family) -> str:
    """A row for each case, form and batch: microseconds of every implementation, the fastest in bold."""
    records = [record for record in stored["records"] if record["suite"] == family]
    names = list(dict.fromkeys(record["implementation"] for record in records))
    rows: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        form = f"{record['density']:.0%}" if record["pattern"] == "random" else record["pattern"]
        rows.setdefault((record["case"], form, record["batch"]), {})[record["implementation"]] = record
    head = ("layer", "form", "batch", *(name.removeprefix("tersetorch ") for name in names))
    ours = {record["implementation"] for record in records if record["family"] == "ours"}
    head = tuple(
        f"**{title}**" if name in ours else title for title, name in zip(head, ("", "", "", *names), strict=True)
    )
    lines = [head, ("---",) * len(head)]
    for key, of_row in rows.items():
        fastest = min(of_row.values(), key=lambda record: float(record["median_ms"]))
        cells = (_cell(of_row.get(name), fastest) for name in names)
        lines.append((*map(str, key), *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def all_speeds(*stored: Record) -> str:
    """The tables of every family that was measured, each under its title and its GPU."""
    of_family = {record["suite"]: one for one in stored for record in one["records"]}
    return "\n".join(
        f"### {TITLES[family]} ({of_family[family]['machine']['rates']['gpu']})\n{speeds(of_family[family], family)}"
        for family in FAMILIES
        if family in of_family
    )


def _cell(record: Record | None, fastest: Record) -> str:
    if record is None:
        return ""
    microseconds = f"{1e3 * record['median_ms']:.1f}"
    return f"**{microseconds}**" if record is fastest else microseconds
