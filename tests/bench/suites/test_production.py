from collections import OrderedDict

import pytest
import torch
from torch import nn

from tersetorch.bench import production_tables
from tersetorch.bench.options import Options
from tersetorch.bench.production_networks import NETWORKS, Network
from tersetorch.bench.suites import production
from tersetorch.bench.suites.production import CALLED, COMPILED, LOADED, PLANS, SUFFIXES, Group, Production, groups


def two_layers():
    return nn.Sequential(OrderedDict(fc6=nn.Linear(40, 24), relu6=nn.ReLU(), fc7=nn.Linear(24, 5)))


SMALL = Network("small", two_layers, {"fc6": 0.2, "fc7": 0.5}, (40,))


@pytest.fixture
def quick(monkeypatch):
    for name in ("SECONDS", "QUICK_SECONDS", "LOADING_SECONDS"):
        monkeypatch.setattr(production, name, 1e-3)


@pytest.fixture
def no_compiler(monkeypatch):
    """What the compilers return is the model."""
    monkeypatch.setattr(production, "compiled", lambda model, x: model)
    monkeypatch.setattr(production, "frozen", lambda model, x: model)
    monkeypatch.setattr(production, "packaged", lambda model, x, folder: model)


def test_groups_follow_the_threads():
    one, two = groups(Options()), groups(Options(threads=2))
    assert {group.pattern for group in one} == {COMPILED, LOADED}
    assert {group.pattern for group in two} == {COMPILED, CALLED}
    assert [group.network.name for group in one[:3]] == [network.name for network in NETWORKS]
    assert groups(Options(cases=("lenet-5",))) == [Group(NETWORKS[1], 1, COMPILED)]
    assert {group.batch for group in groups(Options(batches=(3, 5)))} == {3, 5}


def test_networks_have_the_densities_they_say():
    for network in NETWORKS[:2]:
        model = network.pruned()
        for name, density in network.densities.items():
            weight = model.get_parameter(f"{name}.weight")
            assert weight.count_nonzero() == pytest.approx(density * weight.numel(), rel=0.3), name
        assert torch.equal(network.pruned()(network.samples(2)), model(network.samples(2)))
        assert model.get_parameter("fc1.weight").unique().numel() <= 32
    assert SMALL.coded(4).get_parameter("fc6.weight").unique().numel() == 16


def test_compiled_records_say_what_convert_chose(measured, quick, no_compiler):
    records, left_out = Production(Options(), measured).measure(Group(SMALL, 2, COMPILED))
    assert not left_out
    names = [name + suffix for name in ("torch dense", "tersetorch convert") for suffix in SUFFIXES]
    assert [record["implementation"] for record in records] == names
    assert all(record["max_error"] < 1e-6 and record["p30_ms"] > 0 for record in records)
    assert records[0]["ops"] == 2 * 2 * (40 * 24 + 24 * 5) and "chosen" in records[4] and "chosen" not in records[0]
    table = production_tables.compiled(records).splitlines()
    assert len(table) == 2 + len(SUFFIXES) and "| small | 2 | 1 | eager |" in table[2]


def test_a_form_that_is_wrong_is_never_timed(measured, quick, no_compiler, monkeypatch):
    monkeypatch.setattr(production, "frozen", lambda model, x: lambda samples: -model(samples))
    records, left_out = Production(Options(), measured).measure(Group(SMALL, 1, COMPILED))
    assert [row.implementation for row in left_out] == [
        f"{n} compiled, frozen" for n in ("torch dense", "tersetorch convert")
    ]
    assert len(records) == 6 and all(row.wrong for row in left_out)


@pytest.mark.slow
def test_every_form_compiles(measured, quick):
    records, left_out = Production(Options(), measured).measure(Group(SMALL, 2, COMPILED))
    assert not left_out and len(records) == 2 * len(SUFFIXES)


def test_several_threads_call_one_model(measured, quick):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        records, left_out = Production(Options(threads=3, quick=True), measured).measure(Group(SMALL, 4, CALLED))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert not left_out
    assert {(r["implementation"], r["callers"]) for r in records} == {
        (name, callers) for name in ("torch dense", *PLANS) for callers in (1, 2, 3)
    }
    table = production_tables.called(records).splitlines()
    assert (
        len(table) == 2 + 12
        and table[2].startswith("| 4 | torch dense | 1 |")
        and table[2].endswith("| 1.00x | 1.0x |")
    )


def test_callers_call_at_once_with_one_thread_each():
    from threading import Barrier

    from tersetorch.bench.production_forms import from_threads

    met, seen = Barrier(2, timeout=20), set()

    def call():
        seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        met.wait()  # nobody gets through alone

    before = torch.get_num_threads()
    try:
        times = from_threads({"two": call}, (2,), 2, 0.0)
    finally:
        torch.set_num_threads(before)
    assert seen == {(1, True)} and times["two", 2]["samples"] == 2


def test_loads_are_from_the_file_to_the_first_output(measured, quick):
    records, left_out = Production(Options(quick=True), measured).measure(Group(SMALL, 1, LOADED))
    assert not left_out
    dense, converted, ours = records
    assert dense["file_bytes"] == converted["file_bytes"] > ours["file_bytes"] > 0
    assert dense["weight_bytes"] == 4 * (40 * 24 + 24 + 24 * 5 + 5) != converted["weight_bytes"]
    table = production_tables.loaded(records).splitlines()
    assert len(table) == 5 and table[4].endswith("| 1.00x |")
