"""What is in the sdist."""

import tarfile

import pytest

pytestmark = pytest.mark.slow
# What setuptools and pip leave in a source folder; Makefile and .venv make the sdist and are no part of it.
LEFT = ("build/", "dist/", ".venv", "Makefile")


def test_it_holds_every_source_and_nothing_built(sdist, tree):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert {member.name.partition("/")[0] for member in members} == {sdist.name.removesuffix(".tar.gz")}
    assert all(member.isfile() or member.isdir() for member in members)
    found = {member.name.partition("/")[2] for member in members if member.isfile()}
    sources = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
    sources = {name for name in sources if not name.startswith(LEFT) and ".egg-info/" not in name}
    made = {name for name in found if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert found - made == sources
    assert not [name for name in found if name.endswith((".so", ".pyc", ".o"))]
    assert sdist.stat().st_size < 3 * 2**20
