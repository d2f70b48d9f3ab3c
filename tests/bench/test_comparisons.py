import pytest

from tersetorch.bench import flat_tables, tables
from tersetorch.bench.binary_peers import BINARY
from tersetorch.bench.cases import CASES, FLATS
from tersetorch.bench.coded_peers import CODED
from tersetorch.bench.comparisons import GOALS, Goal, Reached, break_even, by_case, reached
from tersetorch.bench.flat_peers import FLAT
from tersetorch.bench.implementations import MAX_ERROR
from tersetorch.bench.ours import OURS
from tersetorch.bench.peers import PEERS
from tersetorch.bench.production_networks import NETWORKS
from tersetorch.bench.suites import fixed, flat
from tersetorch.bench.suites.binary_networks import Group


def record(implementation, family, p30_ms, mode="float32", **more):
    base = {"suite": "sparse", "case": "alexnet fc6", "kind": "linear", "shape": [4096, 9216], "density": 0.09}
    base |= {"pattern": "random", "batch": 1, "active": 1.0, "cache": "warm", "threads": 1, "limit": "bytes"}
    base |= {"isa": "avx512", "fraction_of_limit": 0.5, "pack_ms": 3.0, "weight_bytes": 2**20}
    return base | {"implementation": implementation, "family": family, "mode": mode, "p30_ms": p30_ms} | more


def test_goals_show_wins_losses_and_what_is_not_measured():
    records = [
        record("oneDNN packed float32", "dense", 10.0),
        record("torch F.linear float32", "dense", 12.0),
        record("tersetorch csr", "ours", 4.0),
        record("tersetorch csr codebook", "ours", 1.0),
        record("tersetorch csr", "ours", 2.0, threads=2),
        record("oneDNN packed float32", "dense", 8.0, threads=2),
        record("tersetorch bitmap", "ours", 0.1, mode="int8"),
    ]
    rows = list(reached(records))
    found = [row for row in rows if isinstance(row, Reached)]
    assert [(row.goal.title, row.threads, row.ratio) for row in found] == [
        ("linear 4096x9216, batch 1, float32 values, 9 %", 1, 2.5),
        ("linear 4096x9216, batch 1, float32 values, 9 %", 2, 4.0),
        ("linear 4096x9216, batch 1, codebook, 9 %", 1, 10.0),
        ("linear 4096x9216, batch 1, codebook, 9 %", 1, 12.0),
    ]
    assert [row.target for row in found] == [(3.3, 5), (3.5, 5), (5.5, 7), (5.8, 7)]
    assert len(found) - 1 + sum(isinstance(row, Goal) for row in rows) == len(GOALS)


def test_goals_take_the_level_they_name_or_the_cpus_own():
    where = {"suite": "binary", "case": "alexnet fc7", "batch": 64, "pattern": "signs"}
    records = [
        record("torch F.linear float32", "dense", 30.0, **where),
        record("tersetorch xnor", "ours", 1.0, "binary", **where),
        record("torch F.linear float32", "dense", 32.0, isa="avx2", **where),
        record("tersetorch xnor", "ours", 0.5, "binary", isa="avx2", **where),
    ]
    found = {row.goal.title: row.ratio for row in reached(records) if isinstance(row, Reached)}
    assert found == {"signs, alexnet fc7, batch 64, floats out": 30, "signs, alexnet fc7, batch 64, AVX2": 64}


def test_goals_name_cases_and_peers_that_exist():
    peers = [row.name for rows in PEERS.values() for row in rows] + [row.name for row in CODED]
    peers += ["torch dense", *(row.name for rows in BINARY.values() for row in rows), *(row.name for row in FLAT)]
    peers += fixed.ROUNDINGS
    others = {"SqueezeNet of Deep Compression", Group(4096, 1).case, fixed.Group().label}
    others |= {network.name for network in NETWORKS}
    patterns = {flat.FRESH, flat.KEPT, fixed.FRESH, fixed.KEPT}
    for goal in GOALS:
        assert goal.where["case"] in {*CASES, *FLATS, *others}
        assert goal.where.get("suite") not in ("flat", "fixed") or goal.where["pattern"] in patterns
        for pattern in goal.peers:
            assert any(name.startswith(pattern.rstrip("*")) for name in peers)
        assert len(goal.goal) in (1, 2) and all(mode in MAX_ERROR for mode in goal.modes)
    assert all(row.family == "ours" for rows in OURS.values() for row in rows)


@pytest.mark.parametrize(
    "times,words",
    [
        ([1.0, 2.0, 3.0], "beyond 40 % (fast)"),
        ([1.0, 2.0, 6.0], "to 30 % (fast)"),
        ([5.0, 6.0, 7.0], "below 10 % (fast)"),
    ],
)
def test_break_even_lies_between_measured_densities(times, words):
    records = []
    for density, ours in zip((0.1, 0.2, 0.4), times, strict=True):
        records += [record("fast", "dense", 4.0, density=density), record("slow", "dense", 9.0, density=density)]
        records += [record("tersetorch csr", "ours", ours, density=density)]
        records += [record("tersetorch int8", "ours", 0.1, mode="int8", density=density)]
    assert break_even(records, "float32") == words
    assert break_even(records, "int8") is None
    assert len(by_case(records)) == 1


def test_tables_keep_rows_where_we_lose(monkeypatch):
    records = [record("oneDNN packed float32", "dense", 1.0, density=density) for density in (0.03, 0.09)]
    records += [record("tersetorch csr", "ours", 2.0, density=density) for density in (0.03, 0.09)]
    monkeypatch.setattr(tables, "_records", lambda: records)
    assert "| 0.50x |" in tables.all_speeds() and tables.all_speeds().count("\n") == 4
    assert "| 0.50x |" in tables.speeds() and tables.speeds().count("\n") == 3
    assert "below 3 % (oneDNN packed float32)" in tables.break_evens()
    assert "| 0.50 | 0.50 |" in tables.ratios()
    assert "missed" in tables.goals() and tables.goals().count("\n") == 2 + len(GOALS)
    assert tables.packing().count("\n") == 4


def test_tables_without_results_are_empty(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.machine() == "nothing yet.\n"
    for make in (tables.speeds, tables.all_speeds, tables.break_evens, tables.ratios, tables.machine_rates):
        assert make().count("\n") == 2


def test_coded_layers_show_medians_and_both_kinds_of_peers(monkeypatch):
    coded = {"suite": "codebook", "density": 1.0, "pattern": "4 bits", "median_ms": 2.0, "spread_ms": 0.1}
    records = [
        record("oneDNN packed float32", "dense", 8.0, **coded | {"median_ms": 8.0}),
        record("oneDNN packed bfloat16", "dense", 1.0, "bfloat16", **coded),
        record("llama.cpp Q4_0", "coded", 3.0, "int8", **coded | {"median_ms": 3.0}),
        record("tersetorch codebook exact", "ours", 2.0, **coded),
        record("tersetorch csr", "ours", 2.0),
    ]
    monkeypatch.setattr(tables, "_records", lambda: records)
    (row,) = tables.codebook_speeds().splitlines()[2:]
    assert row == (
        "| alexnet fc6 | 4096x9216 | 4 bits | 1 | 1 | float32 | 2.000 ± 0.100 | oneDNN packed float32 8.000 | "
        "llama.cpp Q4_0 3.000 | 4.00x | 1.50x | 50 % (bytes) | 1.0 / 1.0 / 1.0 |"
    )
    assert tables.product_speeds().count("\n") == 2 and "codebook" not in tables.all_speeds()


def test_flattened_convolutions_stand_beside_each_peer():
    where = {"suite": "flat", "case": "flat 128 5x5 at 56", "batch": 32, "pattern": flat.KEPT}
    where |= {"median_ms": 2.0, "spread_ms": 0.1}
    records = [
        record("torch chain float32", "dense", 9.0, **where | {"median_ms": 9.0}),
        record("torch chain float32 channels_last", "dense", 5.0, **where | {"median_ms": 5.0}),
        record("onnxruntime chain", "dense", 3.0, **where | {"median_ms": 3.0}),
        record("oneDNN packed conv float32", "dense", 20.0, **where | {"median_ms": 20.0}),
        record("tersetorch flat", "ours", 2.5, **where),
        record("tersetorch flat channels_last", "ours", 2.0, **where),
        record("tersetorch fixed int8", "ours", 2.0),
    ]
    rows = flat_tables.flat_speeds(records).splitlines()[2:]
    assert len(rows) == 2 and rows[1] == (
        "| 128 5x5 at 56 | 32 | kept | 1 | flat channels_last | 2.000 ± 0.100 | 5.000 (2.50x) | - | - | "
        "3.000 (1.50x) | - | 20.000 (10.00x) | 50 % (bytes) |"
    )
    assert flat_tables.flat_headlines(records).splitlines()[2:] == rows[1:]
    found = {row.goal.title: row.ratio for row in reached(records) if isinstance(row, Reached)}
    assert found == {"flat 128 5x5 at 56, batch 32, pages kept, against the chain": 2.5}


def test_fixed_point_stands_beside_dense_layers_and_a_copy():
    where = {"suite": "fixed", "median_ms": 2.0, "spread_ms": 0.1}
    rounding = where | {"case": fixed.Group().label, "kind": "rounding", "shape": [1 << 24], "pattern": fixed.FRESH}
    rounding |= {"bytes": 1 << 27, "batch": 1}
    records = [
        record("torch F.linear float32", "dense", 6.0, **where | {"median_ms": 6.0}),
        record("torch dynamic int8", "dense", 1.0, "int8", **where | {"median_ms": 1.0}),
        record("tersetorch fixed int8", "ours", 2.0, "int8", **where),
        record("tersetorch stochastic", "ours", 20.0, **rounding | {"median_ms": 20.0}),
        record("torch fake_quantize, nearest", "dense", 50.0, **rounding | {"median_ms": 50.0}),
        record("torch clone", "copy", 10.0, **rounding | {"median_ms": 10.0}),
    ]
    (row,) = flat_tables.fixed_speeds(records).splitlines()[2:]
    assert row == (
        "| alexnet fc6 | 4096x9216 | 1 | 1 | int8 | 2.000 ± 0.100 | torch F.linear float32 6.000 (3.00x) | "
        "torch dynamic int8 1.000 (0.50x) | 50 % (bytes) |"
    )
    rows = flat_tables.fixed_roundings(records).splitlines()[2:]
    assert len(rows) == 3 and rows[0].endswith("| 20.00 ± 0.10 | 6.7 | 50 % | 2.50x |")
    found = {row.goal.title: row.ratio for row in reached(records) if isinstance(row, Reached)}
    assert found == {"stochastic rounding of 16 Mi floats, against fake_quantize to the nearest": 2.5}
