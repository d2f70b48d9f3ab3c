"""Fuzzes what reads other people's files: ``PYTHONPATH=tests python -m fuzz files --seconds 3600 --corpus DIR``.

Inputs that reach new code are kept in DIR/TARGET/corpus, from where the next run goes on; those that crash, hang or
take too much memory in DIR/TARGET/crashes, each with its traceback. ``--replay FILE`` runs one of them again. Exits
with 1 for crashes. If native code takes the process down, DIR/TARGET/crashes/running is the input.
"""

import argparse
import sys
from pathlib import Path

from fuzz.engine import Session, observe
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("targets", nargs="+", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60, help="how long, for each target (60)")
    parser.add_argument("--runs", type=int, default=1 << 62, help="at most so many inputs")
    parser.add_argument("--seed", type=int, default=0, help="of the random generator; the same gives the same inputs")
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="folder for inputs (build/fuzz)")
    parser.add_argument("--replay", type=Path, help="runs this input alone")
    asked = parser.parse_args()
    crashes = []
    for name in asked.targets:
        if asked.replay:
            _, failure = observe(TARGETS[name], asked.replay.read_bytes())
            crashes += [asked.replay] if failure else []
            print(failure or "read, or refused in a sentence")
            continue
        folder = asked.corpus / name
        session = Session(TARGETS[name], folder / "crashes", folder / "corpus")
        session.fuzz(asked.seconds, asked.runs, asked.seed, lambda line, name=name: print(name, line, flush=True))
        for crash in session.found:
            print(f"{crash}: {crash.with_suffix('.txt').read_text().splitlines()[-1]}")
        crashes += session.found
    return int(bool(crashes))


if __name__ == "__main__":
    sys.exit(main())
