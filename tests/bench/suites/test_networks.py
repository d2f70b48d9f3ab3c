import torch

import tersetorch as tt
from tersetorch.bench.options import Options
from tersetorch.bench.suites import networks
from tersetorch.bench.suites.networks import Group, Network, Networks, groups


def small(folder):
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5)
    model = torch.nn.Sequential(*layers).eval()
    tt.prune.magnitude(model, sparsity=0.5)
    return tt.finalize(model)


def test_networks_are_found_by_their_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    assert groups(Options()) == []
    network = networks.NETWORKS[1]
    (tmp_path / "models").mkdir()
    (tmp_path / network.files[0]).touch()
    assert groups(Options()) == [Group(network, 1), Group(network, 16)]
    assert groups(Options(quick=True)) == [Group(network, 1)]
    assert groups(Options(cases=("squeezenet",))) == []


def test_records_hold_dense_and_converted(tmp_path, monkeypatch, measured):
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    monkeypatch.setenv("TERSETORCH_CACHE", str(tmp_path))
    monkeypatch.setattr(networks, "SECONDS", 1e-3)
    group = Group(Network("small", small, (), (2, 8, 8)), 3)
    records, left_out = Networks(Options(), measured).measure(group)
    assert not left_out
    assert [record["implementation"] for record in records] == list(networks.NAMES)
    dense, ours = records[0], records[3]
    assert dense["family"] == "dense" and ours["family"] == "ours" and "chosen" in ours
    assert dense["ops"] == 2 * 3 * (4 * 36 * 18 + 144 * 5) > ours["ops"]
    assert all(record["max_error"] < 1e-5 and record["fraction_of_limit"] > 0 for record in records)


def test_a_wrong_network_is_never_timed(tmp_path, monkeypatch, measured):
    monkeypatch.setenv("TERSETORCH_DATA", str(tmp_path))
    monkeypatch.setattr(networks, "SECONDS", 1e-3)
    monkeypatch.setattr(networks.conversion, "convert", lambda model, x: torch.nn.Sequential(model, torch.nn.ReLU()))
    records, left_out = Networks(Options(), measured).measure(Group(Network("small", small, (), (2, 8, 8)), 1))
    assert {record["family"] for record in records} == {"dense"}
    assert len(left_out) == 2 and all(row.wrong for row in left_out)
