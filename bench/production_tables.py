"""Tables of networks in use."""

from __future__ import annotations

from .comparisons import Record, by_case, fastest
from .markdown import markdown
from .suites.production import CALLED, COMPILED, LOADED, SUFFIXES


def compiled(records: list[Record]) -> str:
    """One row for each network and way to run it: the converted network beside the dense one run alike."""
    rows = []
    for same in _cases(records, COMPILED):
        dense = {r["implementation"]: r for r in same if r["family"] == "dense"}
        best = fastest(dense.values()) if dense else None
        for suffix in SUFFIXES:
            ours = next((r for r in same if r["implementation"] == "tersetorch convert" + suffix), None)
            theirs = dense.get("torch dense" + suffix)
            if ours is None or theirs is None or best is None:
                continue
            rows.append(
                (
                    *_place(ours),
                    suffix.strip() or "eager",
                    _ms(theirs),
                    _ms(ours),
                    _ratio(theirs, ours),
                    _ratio(best, ours),
                    ", ".join(f"{layer} {name}" for layer, name in ours["chosen"].items()) or "nothing",
                )
            )
    head = ("network", "batch", "threads", "run", "dense, ms", "converted, ms", "dense / converted")
    return markdown((*head, "fastest dense / converted", "what convert changed"), rows)


def called(records: list[Record]) -> str:
    """Samples a second of one model called from one thread and from several."""
    rows = []
    found = [r for r in records if r["suite"] == "production" and r["pattern"] == CALLED]
    for batch, name in dict.fromkeys((r["batch"], r["implementation"]) for r in found):
        mine = {r["callers"]: _rate(r) for r in found if (r["batch"], r["implementation"]) == (batch, name)}
        dense = {r["callers"]: _rate(r) for r in found if (r["batch"], r["implementation"]) == (batch, "torch dense")}
        for callers, rate in mine.items():
            scaling = f"{rate / mine[1]:.2f}x" if 1 in mine else "-"
            than_dense = f"{rate / dense[callers]:.1f}x" if callers in dense else "-"
            rows.append((batch, name, callers, f"{rate:,.0f}", scaling, than_dense))
    return markdown(("batch", "", "calling threads", "samples/s", "than from one", "than dense"), rows)


def loaded(records: list[Record]) -> str:
    """From a file to the first output."""
    rows = []
    for same in _cases(records, LOADED):
        ours = next((r for r in same if r["family"] == "ours"), None)
        for r in same:
            than_ours = "-" if ours is None else _ratio(r, ours)
            rows.append((*_place(r), r["implementation"], f"{r['file_bytes']:,}", _ms(r), than_ours))
    return markdown(("network", "batch", "threads", "", "bytes of the file", "ms", "of tersetorch's time"), rows)


def _cases(records: list[Record], pattern: str) -> list[list[Record]]:
    return list(by_case(r for r in records if r["suite"] == "production" and r["pattern"] == pattern).values())


def _place(record: Record) -> tuple[str, int, int]:
    return record["case"], record["batch"], record["threads"]


def _ms(record: Record) -> str:
    return f"{record['median_ms']:.3f} ± {record['spread_ms']:.3f}"


def _ratio(peer: Record, ours: Record) -> str:
    return f"{peer['median_ms'] / ours['median_ms']:.2f}x"


def _rate(record: Record) -> float:
    return float(1e3 * record["batch"] / record["median_ms"])
