import json
import os

import torch

from tersetorch.conversion.machine import is_busy, load, machine_facts


def test_facts_are_plain_and_of_now():
    threads = torch.get_num_threads()
    facts = machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"]
    assert facts["threads"] == threads
    assert facts["torch"] == torch.__version__
    assert facts["isa"] in ("scalar", "avx2", "avx512", "avx512bf16")


def test_load(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for average, busy in ((0.0, False), (2.0, False), (2.5, True)):
        monkeypatch.setattr(os, "getloadavg", lambda average=average: (average, 0.0, 0.0))
        assert (load(), is_busy()) == (average, busy)
