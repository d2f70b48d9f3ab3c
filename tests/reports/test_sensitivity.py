import sys

import pytest

from tersetorch.methods.prune import Sensitivity
from tersetorch.reports.sensitivity import draw_sensitivity

FOUND = Sensitivity(0.9, {f"layer{index}": {0.5: 0.9, 0.9: 0.1 * index} for index in range(15)})


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_curve_for_each_layer(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    draw_sensitivity(FOUND, path, "accuracy")
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")


def test_the_svg_names_layers_and_axis(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    draw_sensitivity(FOUND, tmp_path / "picture.svg", "accuracy on held-out images")
    text = (tmp_path / "picture.svg").read_text()
    assert all(name in text for name in (*FOUND.layers, "accuracy on held-out images", "weights of the layer kept, %"))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="draw_sensitivity: the picture must be drawn by matplotlib"):
        draw_sensitivity(FOUND, tmp_path / "picture.png")
