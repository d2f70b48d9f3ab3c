import json

import pytest

from tersetorch.recipes.compression_record import CompressionRecord, Point, SensitivityCurves, record_path


def record():
    before, after = (
        Point(label=word, file_bytes=size, error_percent=1.5) for word, size in (("dense", 9), ("small", 3))
    )
    curves = SensitivityCurves(baseline=1.5, layers={"fc1": [(0.5, 1.75)]})
    return CompressionRecord(data="digits", examples=2, before=before, after=after, sensitivity=curves, recipe={"a": 1})


def test_what_is_written_is_read(tmp_path):
    path = record_path(tmp_path / "small.terse")
    record().write(path)
    assert path == tmp_path / "small.record.json" and [path] == list(tmp_path.iterdir())
    assert CompressionRecord.read(path) == record()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            {"prune": {"sparsity": 0.5, "rounds": 1, "train": {"epochs": 1, "lr": 0.1}}},
            "pruned by magnitude, retrained",
        ),
        (
            {"prune": {"sparsity": 0.5, "method": "obs", "calibration": 9}},
            "pruned by second derivatives, calibrated on up to 9 training examples, not retrained",
        ),
        ({"prune": {"sparsity": 0.5, "method": "obs", "calibration": 10**5000}}, ""),
        ({"share": {"bits": 4}}, ""),
        ({"a": 1}, ""),
        ({}, ""),
    ],
)
def test_how_it_was_pruned_is_said_in_words(recipe, words):
    assert record().model_copy(update={"recipe": recipe}).how_pruned == words


@pytest.mark.parametrize("text,where", [("", "the file"), ("[]", "the file"), ('{"format": 2}', "format")])
def test_what_is_no_record_is_refused(tmp_path, text, where):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"'tersetorch compress' writes beside its file, got another at {where}"):
        CompressionRecord.read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("before.file_bytes", 10**400),
        ("after.error_percent", 1e308),
        ("before.error_percent", -1e308),
        ("points.0.file_bytes", 2**53),
        ("points.0.error_percent", 101.0),
        ("sensitivity.baseline", 1e308),
        ("sensitivity.layers.fc1.0.0", 1.5),
        ("sensitivity.layers.fc1.0.1", -1e308),
        ("seconds", 1e308),
        ("seconds", -1.0),
        ("examples", 10**400),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_name(tmp_path, path, number):
    plain = record().model_copy(update={"points": [record().before]}).model_dump(mode="json")
    *parts, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    where = plain
    for part in parts:
        where = where[part]
    where[last] = number
    (tmp_path / "x.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=rf"got another at {path} \(Input should be "):
        CompressionRecord.read(tmp_path / "x.json")


def test_sums_of_floats_may_lie_beyond_by_a_hair():
    Point(label="", file_bytes=1, error_percent=-1e-14)
    Point(label="", file_bytes=1, error_percent=100 + 1e-12)
