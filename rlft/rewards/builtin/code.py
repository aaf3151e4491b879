"""Run the program in a completion against tests: the share of tests it passes.

The program is the last fenced block of Python (```` ``` ````, `py`, `python`) of the completion. The tests are a column
of the dataset, the first of these that is not null:

- `tests`, `test_cases`, `test_list`, `asserts` or `test`: a list of assert texts (MBPP); one text (HumanEval, whose
  `check` is called with the function named by the column `entry_point`); a list of {"input": ..., "output": ...};
  {"inputs": [...], "outputs": [...]} (APPS, TACO). With "fn_name" beside them, inputs and outputs are the arguments and
  results of that function or method of `Solution`, else standard input and output. JSON of any of these is read too.
- `inputs` and `outputs`: lists of standard input and of the output expected for it.

`test_setup_code` (MBPP) goes before each assert text. Outputs are equal when their lines are, up to white space at
line ends and blank lines at the end, and the program must end with exit code 0.

    [[rewards]]
    use = "code"
    timeout = 600        # seconds for all completions of a step
    args = { seconds = 6, memory_mb = 1024, all_or_nothing = true }

What a pass means. The expected outputs never enter the program's process, and assert texts run in another process that
calls the program's functions (`rlft/rewards/programs/remote.py`). Ending early, overriding `__eq__`, replacing
builtins or searching memory for the answer therefore pass nothing. A program can still pass by knowing the answers:
tests whose inputs the model has seen can be memorised, and a test that only compares objects of the program with each
other trusts their class.

What contains a program: limits on wall time, CPU time, memory, processes, files, descriptors and output; an empty
environment; a folder that is deleted; everything it starts is killed with it. Where the system allows it also has
its own namespaces (no network, no sight of other processes, its folder in memory) and Landlock (it reads only
Python and the system's libraries and writes only its folder). This is containment of what a model happens to write, not
a sandbox against a determined attacker: the kernel is shared. `isolation = "full"` refuses to run without both.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlft.errors import DataError
from rlft.rewards.builtin.exact import text_of
from rlft.rewards.programs.cases import COLUMNS, Case, read_cases
from rlft.rewards.programs.contain import Limits
from rlft.rewards.programs.launcher import Launcher, Request, passed

FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


def code(
    completions: list[Any],
    tests: list[Any] | None = None,
    test_cases: list[Any] | None = None,
    test_list: list[Any] | None = None,
    asserts: list[Any] | None = None,
    test: list[Any] | None = None,
    inputs: list[Any] | None = None,
    outputs: list[Any] | None = None,
    entry_point: list[Any] | None = None,
    test_setup_code: list[Any] | None = None,
    seconds: float = 6.0,
    memory_mb: int = 1024,
    all_or_nothing: bool = False,
    workers: int | None = None,
    isolation: str = "auto",
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **_: Any,
) -> list[float | None]:
    """Return the share of tests that each program passes; 0.0 without a program; None for a row without tests.

    seconds: wall time of one test; after a test that takes longer, the program's other tests count as failed.
    memory_mb: of one test. all_or_nothing: 1.0 for all tests, else 0.0. workers: programs at a time; None for one per
    core. isolation: "auto" uses what the system allows and prints what it does not, "full" requires all. Logs a column
    `outcome`: "passed", or how the first failed test ended. Raises DataError for tests it cannot read, OSError where
    programs cannot be contained.
    """
    if isolation not in ("auto", "full"):
        raise ValueError(f'isolation = "{isolation}": want "auto" or "full"')
    columns: dict[str, Any] = {
        **dict(zip(COLUMNS, (tests, test_cases, test_list, asserts, test), strict=True)),
        "inputs": inputs,
        "outputs": outputs,
        "entry_point": entry_point,
        "test_setup_code": test_setup_code,
    }
    given = {name: values for name, values in columns.items() if values is not None}
    _check_columns(given)
    cases = [read_cases({name: values[i] for name, values in given.items()}) for i in range(len(completions))]
    programs = [_program(text_of(completion)) for completion in completions]
    results = _score(programs, cases, Limits(seconds, memory_mb), all_or_nothing, workers, isolation)
    if log_extra is not None:
        log_extra("outcome", [outcome for _, outcome in results])
    return [reward for reward, _ in results]


def check_row(row: dict[str, Any], args: dict[str, Any]) -> None:
    """Raise DataError for a row of the dataset whose tests cannot be read."""
    _check_columns(row)
    read_cases(row)


def _check_columns(names: Iterable[str]) -> None:
    if not {*COLUMNS, "inputs"} & {*names}:
        raise DataError(f"no column of tests: name one {', '.join(COLUMNS)}, or inputs and outputs, with data.columns")


def _score(
    programs: list[str | None],
    cases: list[list[Case]],
    limits: Limits,
    all_or_nothing: bool,
    workers: int | None,
    isolation: str,
) -> list[tuple[float | None, str]]:
    """Return reward and outcome of each program. Each of the threads has a launcher, for one program at a time."""
    results: list[tuple[float | None, str]] = [(None, "") if not wanted else (0.0, "no program") for wanted in cases]
    rows = [i for i, program in enumerate(programs) if program is not None and cases[i]]
    shared = iter(rows)  # every thread takes the next one

    def work() -> None:
        launcher = None
        try:
            for i in shared:
                launcher = launcher or _launcher(limits, isolation)
                results[i], alive = _run(launcher, programs[i] or "", cases[i], all_or_nothing)
                launcher = launcher if alive else None
        finally:
            if launcher is not None:
                launcher.close()

    count = min(workers or os.cpu_count() or 1, len(rows))
    with ThreadPoolExecutor(max(1, count)) as pool:
        for future in [pool.submit(work) for _ in range(count)]:
            future.result()
    return results


def _run(launcher: Launcher, program: str, cases: list[Case], all_or_nothing: bool) -> tuple[tuple[float, str], bool]:
    """Return the reward and outcome of a program, and whether the launcher can be used again."""
    held, outcome, alive = 0, "passed", True
    for case in cases:
        ended = launcher.run(Request(program, case.stdin, case.code, case.entry_point))
        if case.code is not None:
            good = passed(ended)
        else:
            good = ended is not None and ended[:2] == ("exit", 0) and _lines(ended.stdout) == _lines(case.stdout)
        held += good
        if good:
            continue
        if outcome == "passed":
            outcome = _outcome(ended)
        alive = ended is not None
        if all_or_nothing or ended is None or ended.outcome == "seconds":
            break
    share = held / len(cases)
    return (float(share == 1) if all_or_nothing else share, outcome), alive


def _outcome(ended: Any) -> str:
    if ended is None:
        return "killed its launcher"
    if ended.outcome not in ("exit", "signal"):
        return f"over the limit: {ended.outcome}"
    if ended[:2] == ("exit", 0):
        return "wrong output"
    last = ended.stderr.strip().splitlines()[-1:] or [""]
    return f"{ended.outcome} {ended.code}: {last[0]}"[:200].rstrip(": ")


def _launcher(limits: Limits, isolation: str) -> Launcher:
    launcher = Launcher(limits)
    missing = [
        name
        for name, has in (("user namespaces", launcher.system.namespaces), ("Landlock", launcher.system.landlock))
        if not has
    ]
    if missing and isolation == "full":
        launcher.close()
        raise OSError(f'isolation = "full": this system has no {" and no ".join(missing)}; set "auto" to go without')
    if limits not in _tried:
        if missing:
            print(f"code: this system allows no {' and no '.join(missing)}; programs run without", file=sys.stderr)
        ended = launcher.run(Request("print(1)"))
        if ended is None or ended[:3] != ("exit", 0, "1\n"):
            launcher.close()
            raise OSError(
                f"a program that prints 1 fails within {limits}: {_outcome(ended)}; raise memory_mb or seconds"
            )
        _tried.add(limits)
    return launcher


_tried: set[Limits] = set()
"""Limits under which a program is known to run in this process."""


def _program(text: str) -> str | None:
    blocks = [
        block["text"] for block in FENCE.finditer(text) if block["language"].lower() in ("", "py", "python", "python3")
    ]
    return blocks[-1] if blocks else None


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
