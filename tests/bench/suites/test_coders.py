import dataclasses

from tersetorch.bench.options import Options
from tersetorch.bench.suites import coders
from tersetorch.bench.suites.coders import BITS, CODERS, KINDS, Coders, Group, groups


def test_groups_are_of_one_thread():
    asked = groups(Options())
    assert {(group.bits, group.kind) for group in asked} == {(bits, kind) for bits in BITS for kind in KINDS}
    assert len({group.label for group in asked}) == len(asked) == len(BITS) * len(KINDS) + 1
    assert groups(Options(threads=2)) == [] and groups(Options(cases=("nothing",))) == []


def test_every_coder_is_verified_and_timed_in_both_directions(measured, monkeypatch):
    monkeypatch.setattr(coders, "QUICK_SECONDS", 1e-4)
    records, left_out = Coders(Options(quick=True), measured).measure(Group(5, 4096))
    assert not left_out and len(records) == 2 * len(CODERS)
    of = {(record["implementation"], record["pattern"]): record for record in records}
    assert of["tersetorch packed", "decode"]["bytes"] == 4096 * 5 // 8
    # 4.05 bits of entropy a code, and tables.
    for name in ("huffman", "rans", "contexts"):
        assert 4096 * 4 / 8 < of[f"tersetorch {name}", "decode"]["bytes"] < 4096 * 4.2 / 8
    assert of["zlib, level 9", "decode"]["bytes"] > 4096 * 4.4 / 8 and of["lzma", "encode"]["p30_ms"] > 0


def test_a_coder_that_loses_codes_is_left_out(measured, monkeypatch):
    bad = dataclasses.replace(CODERS[0], decode=lambda data, entries, count: CODERS[0].decode(data, entries, count) * 0)
    monkeypatch.setattr(coders, "CODERS", (bad,))
    records, left_out = Coders(Options(quick=True), measured).measure(Group(4, 512))
    assert not records and all(each.wrong and "decodes something else" in str(each) for each in left_out)
