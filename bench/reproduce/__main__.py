"""torchrun --nproc-per-node RANKS -m tersetorch.bench.reproduce ROW: a row's trainings share each batch over ranks.

Every rank runs the row: the trainings of tersetorch.zoo.fit are shared out, all else is done by each alike, and rank 0
alone prints and stores. What is drawn and rounded on the way depends on the number of ranks. Where a rank is killed,
torchrun --max-restarts goes on with the seeds that --json has no notes of, and lenet_300_100 and lenet_5 from the last
finished training. Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import distributed

from tersetorch.bench.reproduce import ROWS, runs
from tersetorch.zoo.ranks import start


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a row on the ranks that torchrun has started."""
    parser = argparse.ArgumentParser("python -m tersetorch.bench.reproduce")
    parser.add_argument("row", metavar="ROW", choices=ROWS, help=f"one of {', '.join(ROWS)}")
    parser.add_argument("--json", type=_record, metavar="FILE", help="store the record here; its seeds wait beside it")
    parser.add_argument("--seed", type=int, action="append", help="again for more; 0, 1 and 2 when left out")
    parser.add_argument("--threads", type=int, default=1, help="of each rank; they decide the last digits")
    parser.add_argument("--quick", action="store_true", help="a shorter plan, to see that it runs")
    asked = parser.parse_args(arguments)
    started = start()
    try:
        seeds = tuple(asked.seed or runs.SEEDS)
        runs.reproduce(ROWS[asked.row], seeds, asked.quick, threads=asked.threads, record=asked.json)
    finally:
        if started:
            distributed.destroy_process_group()


def _record(name: str) -> Path:
    path = Path(name)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"FILE must lie in a folder that exists, got {name}")
    return path


if __name__ == "__main__":
    main()
