"""Replays, on the PTX that nvcc made of the CUDA kernels, the launches that their emulated tests make; needs no GPU.

``python -m ptx_interpreter BUILD`` takes the folder where the kernel tests were built with nvcc. It fails where a
kernel leaves other memory than under the emulator, does what no kernel may, holds an instruction that is not modelled,
or was not launched; and where a mistake that was made on purpose is not noticed in any kernel. Without nvcc it says so
and passes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ptx_interpreter import mistakes, recordings
from ptx_interpreter.parse import Kernel, Module
from ptx_interpreter.replay import Name, Outcome, load, replay_all, tensor_cores, unknown_instructions

ROOT = Path(__file__).resolve().parent.parent.parent
# What is always replayed: it has tensor cores for every kernel that uses any.
ARCHITECTURE = 90
OBJECTS = Path("CMakeFiles", "cuda_objects.dir")
SOURCES = {file.stem for file in ROOT.glob("csrc/kernels/*/*_cuda.cu")}


def record(build: Path) -> list[recordings.Recording]:
    """The launches of the emulated tests, each of which runs again if it is newer than what it recorded."""
    folder = build / "launches"
    folder.mkdir(exist_ok=True)
    programs = sorted((build / "tests" / "cuda_emulator").glob("test_*_cuda_emulated"))
    recorded = [folder / f"{program.name}.launches" for program in programs]
    for program, file in zip(programs, recorded, strict=True):
        if not file.exists() or file.stat().st_mtime < program.stat().st_mtime:
            environment = os.environ | {"TERSETORCH_RECORD_LAUNCHES": str(folder)}
            subprocess.run([program], env=environment, check=True, stdout=subprocess.DEVNULL)
    launches = [launch for file in recorded for launch in recordings.read(file)]
    # Kernels that only the ops' tests launch.
    library = build / "tests" / "cuda_emulator" / "libemulated_ops.so"
    known = {launch.kernel for launch in launches}
    for file in sorted(set(folder.glob("*.launches")) - set(recorded)):
        if library.exists() and file.stat().st_mtime > library.stat().st_mtime:
            launches += [launch for launch in recordings.read(file) if launch.kernel not in known]
    return launches


def make_ptx(build: Path, architecture: int, folder: Path) -> None:
    """Makes PTX of every kernel file, where it is older than the sources.

    What objects of the package hold would not do: comments that tell inline assembly from the rest are gone from it.
    """
    folder.mkdir(exist_ok=True)
    newest = max(file.stat().st_mtime for file in (ROOT / "csrc" / "kernels").rglob("*") if file.is_file())
    nvcc = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", (build / "CMakeCache.txt").read_text(), re.MULTILINE)
    assert nvcc is not None
    command = [nvcc[1], "-std=c++17", "-O3", "-DNDEBUG", "-I", ROOT / "csrc", "-ptx", f"-arch=compute_{architecture}"]

    def one(source: Path) -> None:
        to = folder / f"{source.stem}.ptx"
        if not to.exists() or to.stat().st_mtime < newest:
            subprocess.run([*command, "-o", to, source], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, sorted((ROOT / "csrc" / "kernels").glob("*/*_cuda.cu"))))


def report(
    outcomes: dict[Name, Outcome], sizes: dict[Name, int], readable: dict[Name, str]
) -> dict[str, dict[str, object]]:
    """Prints a line a kernel, and gives the same as numbers."""
    rows: dict[str, dict[str, object]] = {}
    width = max(len(readable[name]) for name in outcomes)
    print(f"{'kernel':{width}} launches  executed  reached  bits agree with products")
    for name, outcome in sorted(outcomes.items(), key=lambda item: (item[0][0], readable[item[0]])):
        reached = len(outcome.reached) / sizes[name]
        how = " ".join(sorted(outcome.how)) + (f" {outcome.worst:.1g}" if outcome.worst else "")
        print(f"{readable[name]:{width}} {outcome.launches:8} {outcome.executed:9} {reached:8.0%}  {how}")
        rows[f"{name[0]}: {readable[name]}"] = {
            "launches": outcome.launches,
            "executed": outcome.executed,
            "reached": round(reached, 3),
            "how": how,
        }
    return rows


def check(
    folder: Path, launches: list[recordings.Recording], needs: dict[Name, set[str]], makes_mistakes: bool
) -> tuple[dict[str, dict[str, object]], list[str]]:
    """All launches on the PTX of a folder: the table, and what is wrong."""
    started = time.process_time()
    kernels = load(folder, SOURCES)
    targets = {module.target for module, _ in kernels.values()}
    print(f"PTX of {len(kernels)} kernels for {', '.join(f'sm_{target}' for target in sorted(targets))}")
    left_out = {name for name, (_, kernel) in kernels.items() if not needs.get(name, set()) <= tensor_cores(kernel)}
    outcomes, problems = replay_all(kernels, [launch for launch in launches if launch.kernel not in left_out])
    names = list(kernels)
    readable = dict(zip(names, recordings.readable([name[1] for name in names]), strict=True))
    rows = report(outcomes, {name: len(kernel.code) for name, (_, kernel) in kernels.items()}, readable)
    for name, (module, kernel) in kernels.items():
        problems += [f"{name[0]}: {readable[name]}: {problem}" for problem in unknown_instructions(module, kernel)]
    for name, outcome in outcomes.items():
        problems += [f"{name[0]}: {readable[name]}: {problem}" for problem in outcome.problems]
    unlaunched = kernels.keys() - outcomes.keys() - left_out
    problems += check_unlaunched(kernels, outcomes, sorted(unlaunched), readable)
    if left_out:
        print(f"{len(left_out)} kernels are for tensor cores that sm_{min(targets)} lacks")
    if makes_mistakes:
        problems += check_mistakes(kernels, outcomes, launches)
    executed, reached = sum(o.executed for o in outcomes.values()), sum(len(o.reached) for o in outcomes.values())
    total = sum(len(kernels[name][1].code) for name in outcomes)
    number = sum(outcome.launches for outcome in outcomes.values())
    print(
        f"{number} launches of {len(outcomes)} kernels, {executed / 1e6:.0f} million instructions, "
        f"{reached / total:.0%} of all that there are, {time.process_time() - started:.0f} s of one core"
    )
    return rows, problems


def check_unlaunched(
    kernels: dict[Name, tuple[Module, Kernel]],
    outcomes: dict[Name, Outcome],
    unlaunched: list[Name],
    readable: dict[Name, str],
) -> list[str]:
    """A template must be launched, and the assembly that some arguments give it be executed for these or others."""

    def template(name: Name) -> Name:
        return name[0], readable[name].split("<")[0]

    executed: dict[Name, set[str]] = {}
    for name, outcome in outcomes.items():
        code = kernels[name][1].code
        executed.setdefault(template(name), set()).update(code[pc].opcode for pc in outcome.reached)
    problems = []
    for name in unlaunched:
        others = executed.get(template(name))
        assembly = {i.opcode for i in kernels[name][1].code if i.assembly}
        if others is None:
            problems.append(f"{name[0]}: {readable[name]}: no emulated test launches it")
        elif assembly - others:
            problems.append(f"{name[0]}: {readable[name]}: no emulated test executes its {sorted(assembly - others)}")
        else:
            print(f"{readable[name]}: no emulated test launches it, but others of its template")
    return problems


def check_mistakes(kernels: dict, outcomes: dict[Name, Outcome], launches: list[recordings.Recording]) -> list[str]:
    """Each mistake must be noticed in one kernel at least."""
    made = mistakes.make_all(kernels, outcomes, launches)
    problems = []
    for what, _, _ in mistakes.MISTAKES:
        noticed = [how for of, _, how in made if of == what]
        caught = [how for how in noticed if how is not None]
        print(f"mistake: {what:40} noticed in {len(caught)} of {len(noticed)} kernels: {caught[0] if caught else '-'}")
        if noticed and not caught:
            problems.append(f"mistake: {what} must be noticed")
    return problems


def main() -> None:
    """Exits with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="ptx_interpreter", description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--architectures", type=int, nargs="*", default=[], help="these too")
    parser.add_argument("--json", type=Path, help="where to store the tables")
    given = parser.parse_args()
    if not given.build.is_dir():
        parser.error(f"build must be the folder that the kernel tests were built in, got {given.build}")
    build = given.build.resolve()
    if not (build / OBJECTS).is_dir():
        print("ptx_interpreter: skipped, the package was built without nvcc")
        return
    launches = record(build)
    if not launches:
        parser.error(
            f"build must hold emulated tests that launch kernels, got none in {given.build}; run make test-cuda"
        )
    tables, problems, needs = {}, [], {}
    for architecture in [ARCHITECTURE, *given.architectures]:
        folder = build / f"ptx_{architecture}"
        make_ptx(build, architecture, folder)
        if architecture == ARCHITECTURE:
            needs = {name: tensor_cores(kernel) for name, (_, kernel) in load(folder, SOURCES).items()}
        rows, wrong = check(folder, launches, needs, makes_mistakes=architecture == ARCHITECTURE)
        tables[str(architecture)] = rows
        problems += wrong
    if given.json:
        given.json.write_text(json.dumps(tables, indent=1) + "\n")
    for problem in problems:
        print(f"PROBLEM {problem}")
    sys.exit(1 if problems else 0)


main()
