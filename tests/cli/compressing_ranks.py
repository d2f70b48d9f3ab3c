"""What test_ranks runs once for each rank, as torchrun would: python compressing_ranks.py FOLDER CASES PORT...

FOLDER has the files that the commands name; each case, of those below, has a port of its own.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import numpy as np
import torch

import tersetorch as tt
from tersetorch.cli import main

# An option that is given twice counts the second time.
BASE = ("compress", "dense.terse", "--recipe", "recipe.yaml", "--data", "images.npz", "--batch-size", "7")
CASES = {
    "untrained": ("--recipe", "untrained.yaml"),
    "trained": (),
    "calibrated": ("--recipe", "calibrated.yaml"),
    "budget": ("--budget", "8x", "--max-drop", "99"),
    "drop": ("--max-drop", "60"),
    "dry": ("--dry-run",),
    "no recipe": ("--recipe", "nothing.yaml"),
    "no budget": ("--budget", "300"),
    "one fails": ("--data", "my_code:one_fails"),
    "others": ("--data", "my_code:others"),
}
MY_CODE = """
import os
import tersetorch as tt

def rank():
    return int(os.environ["RANK"])

def one_fails():
    if rank() == 1:
        raise RuntimeError("no disk")
    return tt.zoo.read_dataset("images.npz")

def others():
    return tt.zoo.read_dataset("images.npz", seed=rank())
"""


def files(folder):
    """What the commands name: a network, 80 images and recipes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(80, 1, 4, 4, generator=generator)
    np.savez(folder / "images.npz", images=images.numpy(), labels=(images[:, 0, 0] * 2).sum(1).long().numpy())
    torch.manual_seed(0)
    network = tt.zoo.LeNet300100(16)
    tt.save(network, folder / "dense.terse")
    for name, epochs in (("recipe", 2), ("untrained", 0)):
        training = f"train: {{epochs: {epochs}, lr: 0.05}}"
        stages = f"prune: {{sparsity: 0.8, rounds: 1, {training}}}\nshare: {{bits: 4, {training}}}\n"
        (folder / f"{name}.yaml").write_text(stages)
    (folder / "calibrated.yaml").write_text("prune: {method: obs, sparsity: 0.8}\nshare: {bits: 4}\n")
    (folder / "my_code.py").write_text(MY_CODE)


def run(case, port):
    """Exit code, output and error, and what the model became with its record."""
    os.environ["MASTER_PORT"] = port
    module = sys.modules["tersetorch.cli.compress"]
    became = []

    def noted(model, *arguments, **options):
        record = compressed(model, *arguments, **options)
        became.append((model.state_dict(), record.model_dump_json()))
        return record

    compressed, module.run_compression = module.run_compression, noted
    said, wrong = io.StringIO(), io.StringIO()
    code = 0
    try:
        sys.argv = ["tersetorch", *BASE, *CASES[case], "-o", f"{case}.terse"]
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
            main()
    except SystemExit as stopped:
        code = stopped.code or 0
    finally:
        module.run_compression = compressed
    return code, said.getvalue(), wrong.getvalue(), became


def ranked():
    folder, cases = Path(sys.argv[1]), sys.argv[2].split(",")
    torch.set_num_threads(1)
    os.chdir(folder)
    found = {case: run(case, port) for case, port in zip(cases, sys.argv[3:], strict=True)}
    torch.save(found, f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    ranked()
