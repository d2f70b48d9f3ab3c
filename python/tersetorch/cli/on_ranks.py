"""A verb on the ranks that torchrun has started: they work as one, and one of them speaks."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from torch import distributed

from tersetorch.zoo.ranks import first_to_fail, start


@contextmanager
def on_ranks() -> Iterator[None]:
    """Starts torch.distributed where torchrun has started this process, and ends it after its body, a verb.

    Where the body fails on several ranks, the first one's error goes on, and the others exit without a word.
    """
    started = start()
    try:
        yield
    except Exception as error:
        if not first_to_fail():
            raise typer.Exit(1) from error
        raise
    finally:
        if started:
            distributed.destroy_process_group()
