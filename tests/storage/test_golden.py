"""The golden files hold everything that a file can hold, and those of every kind come back to the bit."""

import runpy
from pathlib import Path

import pytest

import tersetorch  # noqa: F401  registers the zoo's kinds
from tersetorch.storage import container, load, registry, save, streams
from tersetorch.storage.entry import DTYPES, FIELDS, FORMS, ROLE_CODERS, Entry

GOLDEN = Path(__file__).parent / "golden"
MADE_BY = {
    "version2_coders": "rare",
    "version2_layers": "others_of_ours",
    "kinds/version2_torch": "of_torch",
    "kinds/version2_zoo": "of_the_zoo",
}
# Their weights are hundreds of megabytes, whatever their arguments; tests/golden/public_api.txt holds their names.
TOO_LARGE = {"zoo.AlexNet", "zoo.VGG16"}
# No two signs take fewer bits by Huffman than packed, so that nobody writes them so.
NEVER_WRITTEN = {("signs", "huffman")}
# Coders in context see other neighbours in each form.
IN_CONTEXT = {(form, role) for form, roles in FORMS.items() for role in roles if "contexts" in ROLE_CODERS[role]}


@pytest.fixture(scope="module")
def headers():
    """Of all golden files."""
    return [container.unpack(path.read_bytes())[0] for path in sorted(GOLDEN.rglob("*.terse"))]


@pytest.fixture(scope="module")
def entries(headers):
    return [Entry.from_json(data) for header in headers for data in header["t"]]


def kinds_in(node):
    if isinstance(node, int):  # a module that came before
        return set()
    return {node.get("k")}.union(*map(kinds_in, node.get("m", {}).values()))


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("name", MADE_BY)
def test_it_comes_back_and_is_written_again(same_state, tmp_path, monkeypatch, name):
    path = GOLDEN / f"{name}.terse"
    namespace = runpy.run_path(GOLDEN / "make_golden.py", run_name="golden")
    model = namespace[MADE_BY[name]]()
    loaded = load(path)
    same_state(model, loaded)
    assert repr(loaded) == repr(model)
    if (
        name == "kinds/version2_zoo"
    ):  # millions of weights that are all alike: the other files show how those are written
        return
    for limit, value in namespace["SMALL"].items():
        monkeypatch.setattr(streams, limit, value)
    save(model, tmp_path / "again.terse")
    assert (tmp_path / "again.terse").read_bytes() == path.read_bytes()


def test_there_is_one_of_every_version():
    found = {str(container.version_of(path.read_bytes())) for path in GOLDEN.rglob("*.terse")}
    assert found == set(container.VERSIONS)


def test_every_form_coder_dtype_and_field_is_in_one(headers, entries):
    assert {entry.form for entry in entries} == set(FORMS)
    assert {entry.dtype for entry in entries} == set(DTYPES.values())
    coders = {(spec.role, spec.coder) for entry in entries for spec in entry.streams}
    assert coders == {(role, coder) for role, known in ROLE_CODERS.items() for coder in known} - NEVER_WRITTEN
    in_context = {(e.form, spec.role) for e in entries for spec in e.streams if spec.coder == "contexts"}
    assert in_context == IN_CONTEXT
    fields = {field for header in headers for data in header["t"] for field in data}
    assert fields == set(FIELDS)


def test_every_kind_of_module_is_in_one(headers):
    found = set().union(*(kinds_in(header["m"]) for header in headers))
    ours = {
        name for name, kind in registry._by_name.items() if kind.cls.__module__.split(".")[0] in ("tersetorch", "torch")
    }
    assert found >= ours - TOO_LARGE  # other tests register kinds of theirs
