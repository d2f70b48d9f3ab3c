"""Every block of code that the README and the docs show is run, or says why not and is checked as far as that goes."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from markdown_it import MarkdownIt

from tersetorch.cli import app, main

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "docs/guide/*.md", "tests/cuda_emulator/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
MARK = re.compile(r"<!-- (not run|file|slow): (.+?) -->")


@dataclass(frozen=True)
class Block:
    """A fenced block and the marks before it: `not run` and `slow` give a reason, `file` the name to write it to."""

    language: str
    text: str
    line: int
    marks: dict[str, str]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order; what is for Sphinx ({toctree}) is left out."""
    found = []
    marks: dict[str, str] = {}
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type == "html_block":
            marks |= dict(MARK.findall(token.content))
        elif token.type == "fence" and not token.info.startswith("{"):
            found.append(Block(token.info.strip(), token.content, token.map[0] + 1, marks))
            marks = {}
        elif token.type not in ("fence", "html_block"):
            marks = {}
    return found


def commands(block: Block) -> list[str]:
    """A block of shell, a command each; lines that end in a backslash go on."""
    joined = re.sub(r"\\\n\s*", " ", block.text)
    return [line for line in map(str.strip, joined.splitlines()) if line and not line.startswith("#")]


def anchors(page: Path) -> set[str]:
    """What links may name behind #, as the repository's view and the site make it of headings."""
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
SHELL = set("|><;&$*`")


def run_or_not(slow):
    """The pages with something to run, those with a slow block apart."""
    for name, page in NAMES.items():
        there = [block for block in blocks(page) if block.language in ("python", "sh") and "not run" not in block.marks]
        if there and any("slow" in block.marks for block in there) == slow:
            yield name


@pytest.mark.parametrize("name", NAMES)
def test_every_block_says_its_language_and_what_is_not_run_why(name):
    for block in blocks(NAMES[name]):
        where = f"{name}:{block.line}"
        assert block.language in ("python", "sh", "yaml", "cpp", "text"), f"{where}: name the block's language"
        if "not run" in block.marks:
            assert block.language in ("python", "sh"), f"{where}: only python and sh are run"
        if block.language in ("yaml", "cpp"):
            assert "file" in block.marks, f"{where}: say in <!-- file: NAME --> what file it is, so that it is used"


@pytest.mark.parametrize("name", list(run_or_not(slow=False)))
def test_blocks_run(name, tmp_path, monkeypatch, capsys):
    run_page(NAMES[name], tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(run_or_not(slow=True)))
def test_slow_blocks_run(name, tmp_path, monkeypatch, capsys):
    run_page(NAMES[name], tmp_path, monkeypatch)


def run_page(page, folder, monkeypatch):
    """In order: Python in one namespace, shell in one folder, which is the current one of both."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    known = set(sys.modules)
    names = {}
    for block in blocks(page):
        if "file" in block.marks:
            (folder / block.marks["file"]).write_text(block.text)
            monkeypatch.delitem(
                sys.modules, Path(block.marks["file"]).stem, raising=False
            )  # another test's of that name
        elif "not run" in block.marks:
            continue
        elif block.language == "python":
            # At its line in the page, so that a failure points there.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "sh":
            run_shell(block, monkeypatch)
    for name in set(sys.modules) - known:  # files of this page must not stand in for those of the next
        if str(getattr(sys.modules[name], "__file__", "") or "").startswith(str(folder)):
            del sys.modules[name]


def run_shell(block, monkeypatch):
    """Commands of ours run in this process, where loading torch is paid already; anything else in a shell."""
    lines = commands(block)
    if not all(line.startswith("tersetorch ") and not SHELL & set(line.split(" #")[0]) for line in lines):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-ec", block.text], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"line {block.line}: {done.stdout}{done.stderr}"
        return
    for line in lines:
        monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code, f"line {block.line}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_run_is_checked(name):
    for block in blocks(NAMES[name]):
        if block.language == "python":
            compile(block.text, f"{name}:{block.line}", "exec")
        if block.language == "sh":
            for command in commands(block):
                check_command(shlex.split(command, comments=True), f"{name}:{block.line}: {command}")


def check_command(words, where):
    """The program exists and has what it is asked for: verbs, targets, modules, options."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words or words[0] == "export":
        return
    program, *rest = words
    options = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
    if program == "tersetorch":
        command = typer.main.get_command(app)
        if rest[0] in command.commands:
            command = command.commands[rest[0]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert not rest[0].isidentifier() or command.name == rest[0], f"{where}: no verb {rest[0]}"
        assert options <= known | {"--help"}, f"{where}: no option {options - known}"
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        variables = [word for word in rest if "=" in word]
        assert set(rest) - set(variables) <= set(targets), f"{where}: no such target"
    elif program in ("python", "torchrun"):
        if program == "torchrun":
            from torch.distributed.run import get_args_parser

            own = [word.partition("=")[0] for word in rest[: rest.index("-m") if "-m" in rest else None]]
            known = get_args_parser()._option_string_actions
            assert all(word in known for word in own if word.startswith("--")), f"{where}: torchrun has no such option"
        if "-m" in rest:
            assert find_spec(rest[rest.index("-m") + 1]), f"{where}: no such module"
        elif scripts := [word for word in rest if word.endswith(".py") and "/" in word]:
            assert all((ROOT / script).is_file() for script in scripts), f"{where}: no such script"
    elif program == "pip":
        done = subprocess.run(
            [sys.executable, "-m", "pip", rest[0], "--help"], capture_output=True, text=True, check=False
        )
        missing = [option for option in options if option not in done.stdout]
        assert done.returncode == 0 and not missing, f"{where}: pip {rest[0]} has no {missing}"
    elif program.startswith("build/"):
        assert list(ROOT.glob(f"tests/*/{Path(program).name}.cpp")), f"{where}: nothing builds {program}"
    else:
        assert shutil.which(program), f"{where}: no program {program}"


def test_links_lead_somewhere():
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        where = page.relative_to(ROOT)
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists() and linked.is_relative_to(ROOT), f"{where} links {target}"
            assert not anchor or anchor in anchors(linked), f"{where} links {target}, which has no such heading"
