import pytest

from tersetorch.bench import rates


@pytest.fixture
def tiny(monkeypatch):
    """Rates and evictions in no time."""
    monkeypatch.setattr(rates, "LARGEST", 2**16)
    monkeypatch.setattr(rates, "QUICK_SECONDS", 1e-4)


@pytest.fixture
def measured():
    """Rates that nobody measured."""
    levels = ("scalar", "avx2", "avx512", "avx512bf16")
    arithmetic = {level: {"float32": 10.0 * (i + 1), "int8": 40.0} for i, level in enumerate(levels)}
    return rates.Rates(1, arithmetic, [(2**14, 100.0), (2**20, 50.0), (2**24, 10.0)])
