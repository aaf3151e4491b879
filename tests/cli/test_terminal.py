"""What a file, a model or a reward function says cannot steer the terminal that a command prints to."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest

from rlft.cli import main as cli
from rlft.cli.main import main, say

STEERING = "\x1b]0;title\x07\x1b[2J\x9b2J\u202eabc\ud83d"


def harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\x07\x9b\u202e\ud83d")


def test_the_message_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", f"/nowhere/{STEERING}.toml"]) == 2
    assert main([STEERING]) == 2
    out, err = capsys.readouterr()
    assert "title" in err and harmless(out + err)


def test_the_text_of_an_exception_that_nobody_expected(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(args: list[str]) -> int:
        raise KeyError(STEERING) if args else RuntimeError(STEERING)

    monkeypatch.setitem(cli.COMMANDS, "env", cli.COMMANDS["env"]._replace(run=broken))
    for argv in (["env"], ["env", "x"]):
        assert main(argv) == 1
    assert harmless(capsys.readouterr().err)


def test_the_settings_that_validate_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.toml"
    quoted = json.dumps(STEERING[:-1]).replace("\\u00", "\\u00")
    file.write_text(
        f'model = "m"\ndata = "d.jsonl"\nout = "o"\nsteps = 0\n[track]\nname = {quoted}\nuse = [{quoted}]\n'
    )
    assert main(["validate", str(file)]) == 2
    file.write_text(file.read_text().replace("steps = 0", "steps = 1"))
    assert main(["validate", str(file)]) == 2
    assert harmless(capsys.readouterr().out)


def test_the_help_of_a_file_with_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.toml"
    use = '[{ use = "number", args = { api_key = "sk-live-1" } }]'
    file.write_text(f'model = {json.dumps(STEERING[:-1])}\ndata = "d"\nout = "o"\nsteps = 1\nrewards = {use}\n')
    with pytest.raises(SystemExit):
        main(["train", str(file), "--help"])
    out = capsys.readouterr().out
    assert "title" in out and harmless(out.replace("\x1b[0m", "")) and "sk-live-1" not in out and "***" in out


def test_a_flag_that_is_nested_too_deeply(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text('model = "m"\ndata = "d"\nout = "o"\nsteps = 1\n')
    assert main(["validate", str(tmp_path / "a.toml"), "--seed", "[" * 5000]) == 2
    assert "seed = " in capsys.readouterr().out


def test_completions_and_faults_of_reward_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": STEERING[:-1], "completion": STEERING[:-1]}) + "\n")
    (tmp_path / "r.py").write_text(
        "def bad(completions, **k):\n    raise ValueError(completions[0])\n"
        "def good(completions, **k):\n    return [1.0]\n"
    )
    for name, code in {"good": 0, "bad": 2}.items():
        assert main(["reward-check", f"{tmp_path}/r.py:{name}", "--data", str(tmp_path / "d.jsonl")]) == code
        assert harmless("".join(capsys.readouterr()))


def test_a_terminal_of_ascii_takes_what_it_can() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    say("a ± b 👩‍🔬", file)
    assert raw.getvalue() == b"a ? b ???\n"


def test_no_command_prints_by_itself() -> None:
    """Beside `say`: the manual, the version, numbers as JSON, what `rlft env` finds, and one word."""
    mine = {"say", "main", "_run", "_eval", "_env"}
    for path in Path(cli.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            prints = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
            assert not prints or function.name in mine, f"{path.name}: {function.name}"
