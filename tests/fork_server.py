"""Runs Python programs, each in a process forked off this one: the seconds that importing torch takes are spent once.

Reads from stdin, a line of JSON for each: program, environment and the files that take its output. Answers with its
return code, negative for a signal, as subprocess does. A program finds what a fresh interpreter would have after
``import torch``, and of the modules that the arguments name, and none of what another program did.
"""

import importlib
import json
import os
import signal
import sys
import traceback

import torch  # noqa: F401  what the programs would wait for

LIMIT_S = 120

for module in sys.argv[1:]:
    importlib.import_module(module)


def run(program: str, environment: dict[str, str], stdout: str, stderr: str) -> int:
    """In the forked process: its return code."""
    signal.alarm(LIMIT_S)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, stdout, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(path, flags), number)
    own, asked = ([*filter(None, e.get("PYTHONPATH", "").split(os.pathsep))] for e in (os.environ, environment))
    sys.path[:] = ["", *asked, *(path for path in sys.path[1:] if path not in own)]
    os.environ.clear()
    os.environ.update(environment)
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = run(**json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
