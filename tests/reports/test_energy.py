import io

import pytest
import torch
from rich.console import Console
from torch import nn

from tersetorch.costs import energy
from tersetorch.reports.energy import draw_energy, energy_table


def models():
    x = torch.zeros(1, 8)
    return {"dense": energy(nn.Linear(8, 8), x), "half": energy(nn.Linear(8, 8).bfloat16(), x.bfloat16())}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draws_a_bar_a_model_and_layer(tmp_path, suffix):
    draw_energy(models(), tmp_path / f"energy.{suffix}")
    assert (tmp_path / f"energy.{suffix}").stat().st_size > 1000


def test_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="models must name at least one, got none"):
        draw_energy({}, tmp_path / "energy.png")


def test_the_table_names_what_was_inferred():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(energy_table(models()))
    shown = console.export_text()
    assert "dense" in shown and "half" in shown and "multiply bfloat16" in shown
