"""Tables of flattened convolutions and of fixed point."""

from __future__ import annotations

from collections.abc import Callable

from .comparisons import Record, by_case, fastest
from .markdown import markdown

# Heading and names of what flattened convolutions are timed beside, the fastest of each.
FLAT_PEERS = {
    "torch's chain": ("torch chain float32", "torch chain float32 channels_last"),
    "torch.compile": ("torch.compile chain channels_last",),
    "openvino": ("openvino chain",),
    "onnxruntime": ("onnxruntime chain",),
    "torch's chain, bfloat16": ("torch chain bfloat16 channels_last",),
    "dense convolution": (
        "torch F.conv2d float32",
        "torch F.conv2d float32 channels_last",
        "oneDNN packed conv float32",
    ),
}


def flat_speeds(records: list[Record]) -> str:
    """Every case of flattened convolutions, also where we lose."""
    return _flat_table(records, lambda _: True)


def flat_headlines(records: list[Record]) -> str:
    """128 channels and 5x5, one image and 32, ours in channels_last."""

    def wanted(record: Record) -> bool:
        ours = record["implementation"] == "tersetorch flat channels_last"
        return ours and record["case"] in ("flat 128 5x5 at 14", "flat 128 5x5 at 56")

    return _flat_table(records, wanted)


def _flat_table(records: list[Record], wanted: Callable[[Record], bool]) -> str:
    """One row for each form of ours: milliseconds of it and of each peer, and in brackets theirs over ours."""
    rows = []
    for same in by_case(r for r in records if r["suite"] == "flat").values():
        for ours in (r for r in same if r["family"] == "ours" and wanted(r)):
            cells = [_beside(ours, [r for r in same if r["implementation"] in names]) for names in FLAT_PEERS.values()]
            rows.append(
                (
                    ours["case"].removeprefix("flat "),
                    ours["batch"],
                    "kept" if "kept" in ours["pattern"] else "fresh",
                    ours["threads"],
                    ours["implementation"].removeprefix("tersetorch "),
                    f"{ours['median_ms']:.3f} ± {ours['spread_ms']:.3f}",
                    *cells,
                    f"{100 * ours['fraction_of_limit']:.0f} % ({ours['limit']})",
                )
            )
    head = ("channels, kernel, image", "batch", "pages", "threads", "ours", "ours, ms")
    return markdown((*head, *FLAT_PEERS, "of our limit"), rows)


def _beside(ours: Record, peers: list[Record]) -> str:
    if not peers:
        return "-"
    best = fastest(peers)
    return f"{best['median_ms']:.3f} ({best['median_ms'] / ours['median_ms']:.2f}x)"


def fixed_speeds(records: list[Record]) -> str:
    """Every layer in fixed point beside the fastest dense layers of the same numbers, also where we lose."""
    rows = []
    found = (r for r in records if r["suite"] == "fixed" and r["kind"] != "rounding")
    for same in by_case(found).values():
        for ours in (r for r in same if r["family"] == "ours"):
            cells = []
            for mode in ("float32", "int8"):
                peers = [r for r in same if r["family"] == "dense" and r["mode"] == mode]
                cells.append(f"{fastest(peers)['implementation']} {_beside(ours, peers)}" if peers else "-")
            rows.append(
                (
                    ours["case"],
                    "x".join(map(str, ours["shape"])),
                    ours["batch"],
                    ours["threads"],
                    ours["implementation"].removeprefix("tersetorch fixed "),
                    f"{ours['median_ms']:.3f} ± {ours['spread_ms']:.3f}",
                    *cells,
                    f"{100 * ours['fraction_of_limit']:.0f} % ({ours['limit']})",
                )
            )
    head = ("layer", "weight", "batch", "threads", "numbers", "ours, ms", "best float32, ms (over ours)", "best int8")
    return markdown((*head, "of our limit"), rows)


def fixed_roundings(records: list[Record]) -> str:
    """Rounding of many floats: bytes a second, beside a copy of the same floats and torch's rounding."""
    rows = []
    found = (r for r in records if r["suite"] == "fixed" and r["kind"] == "rounding")
    for same in by_case(found).values():
        times = {r["implementation"]: r["median_ms"] for r in same}
        for record in same:
            rate = record["bytes"] / record["median_ms"] / 1e6
            copies = [r["bytes"] / r["median_ms"] / 1e6 for r in same if r["family"] == "copy"]
            theirs = times.get("torch fake_quantize, nearest")
            rows.append(
                (
                    f"{record['shape'][0] >> 20} Mi",
                    "kept" if "kept" in record["pattern"] else "fresh",
                    record["threads"],
                    record["implementation"],
                    f"{record['median_ms']:.2f} ± {record['spread_ms']:.2f}",
                    f"{rate:.1f}",
                    f"{100 * rate / copies[0]:.0f} %" if copies else "-",
                    f"{theirs / record['median_ms']:.2f}x" if theirs else "-",
                )
            )
    head = ("floats", "pages", "threads", "", "ms", "GB/s read and written", "of a copy's", "than fake_quantize")
    return markdown(head, rows)
