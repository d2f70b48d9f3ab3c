"""Writes the tables of the README and the docs from stored results: python -m tersetorch.bench.tables.

A page marks a table's place with <!-- table: NAME --> and <!-- end -->; what stands between is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from . import flat_tables, production_tables
from .comparisons import MODES, Reached, Record, break_even, by_case, fastest, reached
from .cuda import kernel_tables
from .cuda import tables as cuda_tables
from .implementations import Mode
from .markdown import markdown as _markdown
from .records import PACKAGES
from .reproduce import ROWS
from .reproduce.runs import SEEDS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = (
    "README.md",
    "docs/results.md",
    "docs/break_even.md",
    "docs/reproductions.md",
    "docs/gpu.md",
    "docs/cuda_kernels.md",
)
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

# What `make bench` writes; one that is not there adds no rows.
CODED_BENCHES = ("bench_coded_1_thread.json", "bench_coded_2_threads.json")
BINARY_BENCHES = ("bench_binary_1_thread.json", "bench_binary_2_threads.json", "bench_binary_avx2.json")
# In processes of their own: how large tensors get their pages depends on what ran before.
FLAT_BENCHES = ("bench_flat_1_thread.json", "bench_flat_2_threads.json")
FIXED_BENCHES = ("bench_fixed_1_thread.json", "bench_fixed_2_threads.json")
PRODUCTION_BENCHES = ("bench_production_1_thread.json", "bench_production_2_threads.json")
BENCHES = (
    "bench_1_thread.json",
    "bench_2_threads.json",
    *CODED_BENCHES,
    *BINARY_BENCHES,
    *FLAT_BENCHES,
    *FIXED_BENCHES,
    *PRODUCTION_BENCHES,
)
# A family is in the record of the card that measured its kernels of today.
GPU_RECORDS = ("bench_cuda_h100.json", "bench_cuda_h200.json")
# (case, density, batch) of the README's rows.
HEADLINES = (
    ("alexnet fc6", 0.09, 1),
    ("alexnet fc7", 0.09, 8),
    ("alexnet fc7", 0.09, 64),
    ("alexnet fc7", 0.35, 64),
    ("transformer ffn up", 0.09, 64),
    ("resnet 256 at 14", 0.1, 1),
    ("resnet 256 at 14", 0.35, 1),
    ("SqueezeNet of Deep Compression", None, 1),
)


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
    """A few cases, float32, beside the strongest peers."""

    def wanted(record: Record) -> bool:
        ordinary = record["suite"] == "networks" or record["pattern"] == "random"
        return (
            ordinary
            and record["cache"] == "warm"
            and record["active"] == 1
            and any(
                record["case"] == case and record["batch"] == batch and density in (None, record["density"])
                for case, density, batch in HEADLINES
            )
        )

    return _speed_table([record for record in _records() if wanted(record)], ("float32",))


def all_speeds() -> str:
    """Every case of sparse layers and of networks that was measured, also where we lose."""
    return _speed_table([record for record in _records() if record["suite"] in ("sparse", "networks")], MODES)


def codebook_speeds() -> str:
    """Every case of dense codes, also where we lose."""
    return _coded_table("codebook")


def product_speeds() -> str:
    """Every case of product quantisation, also where we lose."""
    return _coded_table("product")


def codebook_headlines() -> str:
    """Codes of 4 bits of one large layer that the caches hold as far as they can, and of 8 bits for one sample."""

    def wanted(record: Record) -> bool:
        forms = ("4 bits", "8 bits") if record["batch"] == 1 else ("4 bits",)
        place = (record["case"], record["cache"], record["threads"])
        return place == ("alexnet fc6", "warm", 1) and record["pattern"] in forms and record["batch"] != 64

    return _coded_table("codebook", wanted)


def _coded_table(suite: str, wanted: Callable[[Record], bool] = lambda _: True) -> str:
    """One row for each mode of ours: the median and its spread, beside the fastest dense and the fastest coded peer."""
    rows = []
    for same in by_case(r for r in _records() if r["suite"] == suite and wanted(r)).values():
        rivals = [r for r in same if r["family"] != "ours"]
        for ours in (r for r in same if r["family"] == "ours"):
            dense = [r for r in rivals if r["family"] == "dense" and r["mode"] in ("float32", ours["mode"])]
            coded = [r for r in rivals if r["family"] == "coded"]
            cells, ratios, sizes = [], [], [f"{ours['weight_bytes'] / 2**20:.1f}"]
            for found in (dense, coded):
                best = fastest(found) if found else None
                cells.append("-" if best is None else f"{best['implementation']} {best['median_ms']:.3f}")
                ratios.append("-" if best is None else f"{best['median_ms'] / ours['median_ms']:.2f}x")
                sizes.append("-" if best is None else f"{best['weight_bytes'] / 2**20:.1f}")
            words = [ours["case"]] + ["cold"] * (ours["cache"] == "cold")
            rows.append(
                (
                    ", ".join(words),
                    "x".join(map(str, ours["shape"])),
                    ours["pattern"],
                    ours["batch"],
                    ours["threads"],
                    ours["mode"],
                    f"{ours['median_ms']:.3f} ± {ours['spread_ms']:.3f}",
                    *cells,
                    *ratios,
                    f"{100 * ours['fraction_of_limit']:.0f} % ({ours['limit']})",
                    " / ".join(sizes),
                )
            )
    head = ("layer", "weight", "form", "batch", "threads", "mode", "ours, ms", "best dense, ms", "best coded, ms")
    return _markdown((*head, "than dense", "than coded", "of our limit", "MiB of ours / dense / coded"), rows)


def binary_speeds() -> str:
    """Every case of signs, also where we lose."""
    return _binary_table(lambda _: True)


def binary_headlines() -> str:
    """A large layer and a convolution, samples packed within the time, at the level that this CPU has."""

    def wanted(record: Record) -> bool:
        here = record["case"] in ("alexnet fc7", "resnet 256 at 14") and record["isa"] != "avx2"
        return here and record["threads"] == 1 and "packed" not in record["implementation"]

    return _binary_table(wanted)


def _binary_table(wanted: Callable[[Record], bool]) -> str:
    """One row for each form of ours beside the fastest dense float32, bfloat16 and int8 and another library's signs."""
    rows = []
    records = [r for r in _records() if r["suite"] == "binary"]
    cases = by_case(records).values()
    for same in (list(level) for case in cases for _, level in groupby(case, lambda r: r["isa"])):
        for ours in (r for r in same if r["family"] == "ours" and wanted(r)):
            cells, ratios = [], []
            for family, mode in (*(("dense", mode) for mode in MODES), ("binary", "binary")):
                found = [r for r in same if (r["family"], r["mode"]) == (family, mode)]
                best = fastest(found) if found else None
                cells.append("-" if best is None else f"{best['implementation']} {best['median_ms']:.3f}")
                ratios.append("-" if best is None else f"{best['median_ms'] / ours['median_ms']:.2f}x")
            rows.append(
                (
                    ours["case"],
                    "x".join(map(str, ours["shape"])),
                    ours["batch"],
                    ours["threads"],
                    ours["isa"],
                    ours["implementation"].removeprefix("tersetorch "),
                    f"{ours['median_ms']:.3f} ± {ours['spread_ms']:.3f}",
                    *(f"{cell} ({ratio})" if ratio != "-" else "-" for cell, ratio in zip(cells, ratios, strict=True)),
                    f"{100 * ours['fraction_of_limit']:.0f} % ({ours['limit']})",
                )
            )
    head = ("layer", "weight", "batch", "threads", "level", "ours", "ours, ms", "best float32, ms (over ours)")
    return _markdown((*head, "best bfloat16", "best int8", "signs elsewhere", "of our limit"), rows)


def coder_speeds() -> str:
    """The file's coders beside general ones: bits a code, and millions of codes a second in both directions."""
    rows = []
    for same in by_case(r for r in _records() if r["suite"] == "coders" and r["pattern"] == "encode").values():
        for encoded in same:
            names = ("suite", "case", "implementation")
            decoded = [
                r for r in _records() if r["pattern"] == "decode" and all(r[name] == encoded[name] for name in names)
            ]
            bits = 8 * encoded["weight_bytes"] / encoded["shape"][0]
            rates = (f"{r['shape'][0] / r['median_ms'] / 1e3:.0f}" for r in (encoded, *decoded))
            rows.append((encoded["case"], encoded["implementation"], f"{bits:.3f}", *rates))
    return _markdown(("codes", "coder", "bits a code", "encoded, MB/s", "decoded, MB/s"), rows)


def peer_versions() -> str:
    """What the peers of coded layers are versions of, and why some are missing."""
    for name in CODED_BENCHES:
        if (RESULTS / name).exists():
            record = _load(name)
            found = [f"{package} {record['machine'][package]}" for package in PACKAGES if package in record["machine"]]
            left_out = [f"{peer}: {reason}" for peer, reason in record.get("missing", {}).items()]
            return f"{', '.join(found)}.\n" + "".join(f"- {line}\n" for line in left_out)
    return "nothing yet.\n"


def goals() -> str:
    """The numbers to reach: every row, also those that we miss or that nothing measures yet."""
    rows = []
    for row in reached(_records()):
        if isinstance(row, Reached):
            prototype, goal = row.target
            verdict = "reached" if row.ratio >= goal else "missed"
            if prototype and prototype <= row.ratio < goal:
                verdict = "beyond the prototype"
            names = (f"{part['implementation']} {part['p30_ms']:.3f}" for part in (row.peer, row.ours))
            figures = (row.threads, *names, f"{row.ratio:.2f}", prototype or "-", goal, verdict)
            rows.append((row.goal.title, *figures))
        else:
            rows.append(
                (
                    row.title,
                    "-",
                    ", ".join(row.peers),
                    "-",
                    "-",
                    *(f"{t[0] if t else '-'}" for t in (row.prototype, row.goal)),
                    "not measured",
                )
            )
    head = ("case", "threads", "peer, ms", "ours, ms", "peer / ours", "prototype", "goal", "")
    return _markdown(head, rows)


def break_evens() -> str:
    """Up to which density ours is faster than each kind of dense layer."""
    rows = []
    for records in by_case(r for r in _records() if r["suite"] == "sparse").values():
        first = records[0]
        if len({record["density"] for record in records}) < 2:
            continue
        cells = [break_even(records, mode) for mode in MODES]
        if any(cells):
            rows.append((*_layer(first), first["batch"], first["threads"], *(cell or "-" for cell in cells)))
    rivals = (f"than dense {mode}" for mode in MODES)
    return _markdown(("layer", "weight", "batch", "threads", *rivals), rows)


def ratios() -> str:
    """Time of the fastest dense float32 layer over ours, density by batch by layer."""
    rows = []
    densities = sorted({r["density"] for r in _records() if r["suite"] == "sparse"})
    for records in by_case(r for r in _records() if r["suite"] == "sparse").values():
        first = records[0]
        cells = []
        for density in densities:
            same = [r for r in records if r["density"] == density and r["mode"] == "float32"]
            dense, ours = ([r for r in same if r["family"] == family] for family in ("dense", "ours"))
            cells.append(f"{fastest(dense)['p30_ms'] / fastest(ours)['p30_ms']:.2f}" if dense and ours else "-")
        if set(cells) != {"-"}:
            rows.append((*_layer(first), first["batch"], first["threads"], *cells))
    return _markdown(("layer", "weight", "batch", "threads", *(f"{100 * d:.0f} %" for d in densities)), rows)


def packing() -> str:
    """Milliseconds to pack a weight, once."""
    rows = []
    wanted = {"case": "alexnet fc6", "batch": 1, "cache": "warm", "pattern": "random", "active": 1.0, "threads": 1}
    for record in _records():
        if all(record[field] == value for field, value in wanted.items()) and record["density"] in (0.09, 0.35):
            figures = (f"{record['pack_ms']:.0f}", f"{record['weight_bytes'] / 2**20:.1f}")
            rows.append((record["implementation"], f"{100 * record['density']:.0f} %", *figures))
    return _markdown(("implementation", "non-zero", "packed in ms", "MiB"), rows)


def machine() -> str:
    """The machine that the stored times were taken on."""
    for name in BENCHES:
        if (RESULTS / name).exists():
            facts = _load(name)["machine"]
            return f"{facts['cpu']}, {facts['cores']} cores, level `{facts['isa']}`, torch {facts['torch']}.\n"
    return "nothing yet.\n"


def machine_rates() -> str:
    """What that machine can do at most."""
    rows = []
    for name in BENCHES[:2]:
        if (RESULTS / name).exists():
            rates = _load(name)["machine"]["rates"]
            for level, found in rates["gops"].items():
                for mode, rate in found.items():
                    rows.append((f"multiply-adds {mode}, `{level}`", rates["threads"], f"{rate:,.0f} Gop/s"))
            for size, rate in rates["read_gbytes_per_s"].items():
                rows.append((f"read {int(size) >> 10:,} KiB", rates["threads"], f"{rate:,.1f} GB/s"))
    return _markdown(("rate", "threads", ""), rows)


def _speed_table(records: list[Record], modes: tuple[Mode, ...]) -> str:
    rows = []
    for same in by_case(records).values():
        for density in sorted({record["density"] for record in same}):
            here = [record for record in same if record["density"] == density]
            for mode in modes:
                rows += _speed_row([record for record in here if record["mode"] == mode], mode)
    head = ("layer", "weight", "non-zero", "batch", "threads", "mode", "ours, ms", "best dense, ms", "best sparse, ms")
    return _markdown((*head, "faster than dense", "than sparse", "of our limit"), rows)


def _speed_row(records: list[Record], mode: Mode) -> list[tuple[Any, ...]]:
    best = {
        family: fastest(found)
        for family in ("ours", "dense", "sparse")
        if (found := [record for record in records if record["family"] == family])
    }
    if not records or "ours" not in best or len(best) < 2:
        return []
    ours = best["ours"]
    shown = [
        f"{best[f]['implementation']} {best[f]['p30_ms']:.3f}" if f in best else "-"
        for f in ("ours", "dense", "sparse")
    ]
    ratios = [f"{best[f]['p30_ms'] / ours['p30_ms']:.2f}x" if f in best else "-" for f in ("dense", "sparse")]
    limit = f"{100 * ours['fraction_of_limit']:.0f} % ({ours['limit']})"
    return [
        (*_layer(ours), f"{100 * ours['density']:.0f} %", ours["batch"], ours["threads"], mode, *shown, *ratios, limit)
    ]


def reproductions() -> str:
    """Every row of the papers that has a stored record, as `tersetorch reproduce` shows it."""
    parts = []
    for row in ROWS.values():
        if not (RESULTS / f"{row.name}.json").exists():
            continue
        record = _load(f"{row.name}.json")
        shown = row.table(record)
        cells = [list(column.cells) for column in shown.columns]
        table = _markdown((column.header for column in shown.columns), zip(*cells, strict=True))
        minutes = f"{record['seconds'] / 60:.0f} minutes" if record["seconds"] >= 90 else f"{record['seconds']:.0f} s"
        place = f"{record['machine']['cpu']}, torch {record['machine']['torch']}"
        seeds = [each["seed"] for each in record.get("seeds", ())]
        drawn = "" if seeds == list(SEEDS) else "".join(f" --seed {seed}" for seed in seeds)
        picture = f"\n![{row.words}](plots/{row.name}.svg)\n" if row.draw is not None else ""
        parts.append(f"## {row.words}\n`tersetorch reproduce {row.name}{drawn}`: {minutes} on {place}.\n\n")
        parts.append(f"{shown.caption}\n\n" if shown.caption else "")
        parts.append(f"{table}{picture}\n")
    return "".join(parts)


def _layer(record: Record) -> tuple[str, str]:
    words = [record["case"]]
    words += ["row lengths as trained"] * (record["suite"] == "sparse" and record["pattern"] == "trained")
    words += ["cold"] * (record["cache"] == "cold")
    words += [f"{100 * record['active']:.0f} % active"] * (record["active"] < 1)
    return ", ".join(words), "x".join(map(str, record["shape"]))


def _records() -> list[Record]:
    return [r for name in BENCHES if (RESULTS / name).exists() for r in _load(name)["records"]]


def examples() -> str:
    """What each of examples/python made of its network; one that was not run adds no row."""
    rows = []
    for name, (network, quality) in EXAMPLES.items():
        if not (RESULTS / f"example_{name}.json").exists():
            continue
        record = _load(f"example_{name}.json")
        times = [record.get(key, "") for key in ("dense_ms", "fast_ms")]
        rows.append(
            (
                f"[{network}](../examples/python/{name}.py)",
                quality(record),
                f"{record['dense_bytes']:,}",
                f"{record['file_bytes']:,}",
                f"{record['dense_bytes'] / record['file_bytes']:.1f}x",
                *("as dense" if time is None else time and f"{time:.2f}" for time in times),
            )
        )
    return _markdown(("example", "what it still does", "bytes dense", "bytes", "smaller", "ms dense", "ms"), rows)


def _of_embeddings(record: dict[str, Any]) -> str:
    words = f"cosine to the original {record['mean_cosine']:.3f}, at least {record['least_cosine']:.3f}"
    if "distilled_mean_cosine" in record:
        words += f"; distilled {record['distilled_mean_cosine']:.3f}"
    return words


EXAMPLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "resnet_cifar": (
        "ResNet-20 on CIFAR-10 (JPEG)",
        lambda record: f"test error {record['test_error_before']:.2f} %, then {record['test_error_after']:.2f} %",
    ),
    "squeezenet": (
        "SqueezeNet of Deep Compression",
        lambda record: (
            f"{record['right_of_100']} of 100 images right, {record['right_in_five_of_100']} in five answers"
        ),
    ),
    "sentence_embeddings": ("all-MiniLM-L6-v2", _of_embeddings),
    "lstm": (
        "character LSTM",
        lambda record: (
            f"{record['bits_per_character_before']:.2f} bits a character, then {record['bits_per_character_after']:.2f}"
        ),
    ),
}


def _load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return content


TABLES: dict[str, Callable[[], str]] = {
    "gpu_machines": lambda: cuda_tables.machines(*map(_load, GPU_RECORDS)),
    "gpu_speeds": lambda: cuda_tables.all_speeds(*map(_load, GPU_RECORDS)),
    "cuda_compiler": lambda: kernel_tables.compiler(_load("cuda_kernels.json")),
    "cuda_opcodes": lambda: kernel_tables.opcodes(_load("cuda_kernels.json")),
    "cuda_resources": lambda: kernel_tables.resources(_load("cuda_kernels.json")),
    "examples": examples,
    "sizes": sizes,
    "seeds": seeds,
    "sparser_seeds": sparser_seeds,
    "layers": layers,
    "speeds": speeds,
    "all_speeds": all_speeds,
    "codebook_speeds": codebook_speeds,
    "codebook_headlines": codebook_headlines,
    "product_speeds": product_speeds,
    "peer_versions": peer_versions,
    "binary_speeds": binary_speeds,
    "binary_headlines": binary_headlines,
    "flat_speeds": lambda: flat_tables.flat_speeds(_records()),
    "flat_headlines": lambda: flat_tables.flat_headlines(_records()),
    "fixed_speeds": lambda: flat_tables.fixed_speeds(_records()),
    "fixed_roundings": lambda: flat_tables.fixed_roundings(_records()),
    "coder_speeds": coder_speeds,
    "production_compiled": lambda: production_tables.compiled(_records()),
    "production_called": lambda: production_tables.called(_records()),
    "production_loaded": lambda: production_tables.loaded(_records()),
    "machine": machine,
    "machine_rates": machine_rates,
    "goals": goals,
    "break_evens": break_evens,
    "ratios": ratios,
    "packing": packing,
    "reproductions": reproductions,
}


def draw_plots(folder: Path) -> None:
    """Draws every row that has a stored record and a picture."""
    folder.mkdir(exist_ok=True)
    for row in ROWS.values():
        if row.draw is not None and (RESULTS / f"{row.name}.json").exists():
            row.draw(_load(f"{row.name}.json"), folder / f"{row.name}.svg")


def main() -> None:
    """Writes the pages, and the plots they show."""
    import matplotlib  # the tables alone do without it

    with matplotlib.rc_context({"svg.hashsalt": "tersetorch"}):  # the same record, the same bytes
        draw_plots(ROOT / "docs" / "plots")
    for page in PAGES:
        path = ROOT / page
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
