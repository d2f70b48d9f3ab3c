"""Draws docs/plots/report.png, the README's picture of a report: python docs/report_picture.py.

A small run from start to end: trains on scikit-learn's digits, compresses within a drop of the accuracy, measures, and
looks at the page in Chromium. Times in it are this machine's, which should do nothing else.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torch import nn

import tersetorch as tt
from tersetorch.cli import app

PICTURE = Path(__file__).parent / "plots" / "report.png"
RECIPE = """
prune: {sparsity: {fc1: 0.9, fc2: 0.95}, rounds: 2, train: {epochs: 6, lr: 0.05}}
share: {bits: 4, train: {epochs: 2, lr: 0.001, optimizer: adam}}
"""
COLOURS = 64  # flat colours and grey text: a quarter of the bytes, and nobody sees it


def make_report(folder: Path) -> Path:
    """The page of a network that was trained and compressed here."""
    torch.manual_seed(0)
    digits = tt.zoo.load("digits")
    sizes = {"fc1": (64, 1024), "fc2": (1024, 1024), "fc3": (1024, 10)}
    model = nn.Sequential(nn.Flatten())
    for name, size in sizes.items():
        model.add_module(name, nn.Linear(*size))
        if name != "fc3":
            model.add_module(f"relu{name[2:]}", nn.ReLU())
    tt.zoo.fit(model, digits.train_images, digits.train_labels, epochs=10, batch_size=32)
    os.chdir(folder)
    tt.save(model, "digits.terse")
    Path("recipe.yaml").write_text(RECIPE)
    options = ["--recipe", "recipe.yaml", "--data", "digits", "--batch-size", "32", "--max-drop", "2"]
    app(["compress", "digits.terse", *options, "-o", "small.terse"], standalone_mode=False)
    app(["report", "small.terse", "-o", "report.html", "--input-shape", "1x1x8x8"], standalone_mode=False)
    return folder / "report.html"


def draw(page: Path, picture: Path) -> None:
    """The top of the page, as wide as a laptop's window."""
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = chromium.new_page(viewport={"width": 1280, "height": 960})
        tab.goto(page.as_uri())
        tab.screenshot(path=picture)
        chromium.close()
    Image.open(picture).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        draw(make_report(Path(folder)), PICTURE)
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")
