"""The reference holds every public name, and what docstrings say can be shown."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reference():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import reference
    finally:
        sys.path.remove(str(ROOT / "docs"))
    return reference


def documented(reference):
    """Name -> docstring of what the reference shows: public objects and the methods that are ours."""
    for module, names in reference.places().items():
        for name, value in names.items():
            if reference.is_plain(value):
                yield f"{module}.{name}", "\n".join(reference.comment_above(name))
                continue
            yield f"{module}.{name}", inspect.getdoc(value) or ""
            for member, found in inspect.getmembers(value) if inspect.isclass(value) else ():
                ours = getattr(found, "__module__", None) or getattr(getattr(found, "fget", None), "__module__", "")
                if not member.startswith("_") and str(ours).startswith("tersetorch") and not inspect.isclass(found):
                    yield f"{module}.{name}.{member}", inspect.getdoc(found) or ""


def test_every_public_name_is_described(reference):
    names = dict(documented(reference))
    assert {"tersetorch.convert", "tersetorch.prune.magnitude", "tersetorch.nn.SparseLinear.from_dense"} <= set(names)
    assert len(names) > 400
    assert [name for name, docstring in names.items() if not docstring] == []


def test_every_room_of_the_package_has_a_page_or_says_nothing_public(reference):
    modules = {reference.public_modules()[name] for name in reference.places()}
    for folder in (ROOT / "python" / "tersetorch").iterdir():
        room = sys.modules.get(f"tersetorch.{folder.name}")
        if room is not None and hasattr(room, "__all__") and folder.name not in ("cli", "methods"):
            assert room in modules, folder.name


def test_docstrings_become_markup_without_complaint(reference):
    from docutils.core import publish_doctree
    from sphinx.ext.napoleon import Config, GoogleDocstring

    config = Config(napoleon_use_ivar=True, napoleon_custom_sections=["Source"])
    text = [".. default-role:: literal", ""]
    for name, docstring in documented(reference):
        text += [
            f".. {name}",
            "",
            *str(GoogleDocstring(reference.as_markup(docstring.splitlines()), config)).splitlines(),
            "",
        ]
    text = "\n".join(text)
    complaints = []
    settings = {"report_level": 2, "halt_level": 5, "warning_stream": type("", (), {"write": complaints.append})()}
    publish_doctree(text, settings_overrides=settings)
    assert [complaint for complaint in complaints if "ivar" not in complaint] == []


def test_every_op_of_the_dispatcher_is_in_the_reference_with_its_schema(reference):
    registered = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("tersetorch::")
    }
    shown = reference.schemas()
    assert set(shown) == registered
    assert shown["csr_pack"][0] == "csr_pack(Tensor dense) -> (Tensor, Tensor, Tensor)"
    assert "row_offsets" in shown["csr_pack"][1]


def examples(reference):
    for name, docstring in documented(reference):
        lines = docstring.splitlines()
        if "Example:" in lines:
            start = lines.index("Example:") + 1
            end = next((i for i in range(start, len(lines)) if lines[i] and not lines[i].startswith(" ")), len(lines))
            yield name, inspect.cleandoc("\n".join(["", *lines[start:end]]))


@pytest.mark.slow
def test_examples_in_docstrings_run(reference, tmp_path, monkeypatch):
    """On a small network, with what a docstring takes for granted: data, a loss, a training loop."""
    import tersetorch as tt

    found = dict(examples(reference))
    assert len(found) >= 6
    for name, example in found.items():
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        torch.manual_seed(0)
        model = tt.zoo.LeNet5()
        images, labels = torch.randn(8, 1, 28, 28), torch.randint(0, 10, (8,))

        def train(model, *_, images=images, labels=labels, **__):
            tt.zoo.fit(model, images, labels, epochs=1, lr=0.001)

        class Batches(list):
            def __call__(self, steps):
                return self

        names = {
            "tt": tt,
            "torch": torch,
            "nn": nn,
            "model": model,
            "other": tt.zoo.LeNet5(),
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.001),
            "batches": Batches([(images, labels)]),
            "loss": nn.CrossEntropyLoss(),
            "train": train,
            "accuracy": lambda model: 0.9,
            "images": images,
            "labels": labels,
            **{key: getattr(tt.prune, key) for key in ("GradualPruner", "DynamicSurgery")},
        }
        exec(compile(example, name, "exec"), names)
