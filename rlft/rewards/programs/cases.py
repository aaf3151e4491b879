"""Tests of programs in the forms that public datasets have; `rlft.rewards.builtin.code` lists them."""

from __future__ import annotations

import contextlib
import json
from typing import Any, NamedTuple

from rlft.errors import DataError

COLUMNS = ("tests", "test_cases", "test_list", "asserts", "test")
"""Columns that hold tests, in the order in which they are looked for; then `inputs` and `outputs`."""
CALL = """
import json
_arguments, _expected = json.loads({arguments!r}), json.loads({expected!r})
try:
    _function = {name}
except NameError:
    _function = Solution().{name}
_result = _function(*_arguments)
_result = list(_result) if isinstance(_result, tuple) else _result
assert _result == _expected or [_result] == _expected
"""
"""A test by arguments and result. Some rows of APPS and TACO have the result in a list."""


class Case(NamedTuple):
    """One test of a program."""

    stdin: str = ""
    stdout: str = ""
    """Expected."""
    code: str | None = None
    """Code that calls the program, in place of input and output."""
    entry_point: str = ""


def read_cases(row: dict[str, Any]) -> list[Case]:
    """Return the tests of a row; [] when it has none. Raises DataError for what cannot be read."""
    name = next((name for name in COLUMNS if row.get(name) is not None), "inputs")
    value = row.get(name) if name != "inputs" else {"inputs": row.get("inputs"), "outputs": row.get("outputs")}
    if name == "inputs" and row.get("inputs") is None:
        return []
    entry_point, setup = row.get("entry_point") or "", row.get("test_setup_code") or ""
    try:
        cases = _parsed(_loaded(value), entry_point, setup)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{name} holds no tests that can be read ({error}): {str(value)[:80]!r}") from error
    if not cases:
        raise DataError(f"{name} is empty: give null to a row that is not to be scored by `code`")
    return cases


def _loaded(value: Any) -> Any:
    """Return a value that may be JSON text; other text is code."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        return json.loads(value)
    return value


def _parsed(value: Any, entry_point: str, setup: str) -> list[Case]:
    if isinstance(value, str):
        return [Case(code=f"{setup}\n{value}", entry_point=entry_point)]
    if isinstance(value, dict):
        name = value.get("fn_name") or ""
        given, expected = (_loaded(value.get(f"{key}s", value.get(key))) for key in ("input", "output"))
        if not isinstance(given, list) or not isinstance(expected, list) or len(given) != len(expected):
            raise ValueError("want as many inputs as outputs")
        return [_case(*pair, name) for pair in zip(given, expected, strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"a {type(value).__name__}")
    cases = []
    for each in value:
        if isinstance(each, dict):
            cases.append(_case(each["input"], each["output"], each.get("fn_name") or ""))
        else:
            cases += _parsed(str(each), entry_point, setup)
    return cases


def _case(given: Any, expected: Any, name: str) -> Case:
    """Return the test for an input and an output, or for arguments and a result of the function `name`."""
    if not name:
        return Case("\n".join(given) if isinstance(given, list) else str(given), _text(expected))
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is no name")
    if isinstance(given, str):
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
    if isinstance(expected, str):
        with contextlib.suppress(ValueError):  # a result that is a string
            expected = json.loads(expected)
    return Case(
        code=CALL.format(arguments=json.dumps(given), expected=json.dumps(expected), name=name), entry_point=name
    )


def _text(expected: Any) -> str:
    return "\n".join(map(str, expected)) if isinstance(expected, list) else str(expected)
