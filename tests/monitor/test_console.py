"""The console: plain lines word for word, and the live view in a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from rlft.monitor.console import Console, Level, evaluation_line, evaluation_rows, wrap
from rlft.monitor.health import Message
from rlft.monitor.panel import Example, Panel, clock, label_of, prompt_text, shorten, spark, time_line
from rlft.types import Best

VALUES = {
    "step": 12.0,
    "reward": 0.61,
    "loss": 0.0123,
    "completions/mean_length": 5.21,
    "entropy": 0.333,
    "sampling/sampling_logp_difference/mean": 1.2e-6,
    "parity/limit": 0.02,
    "step_time": 6.1,
    "time/generate": 3.05,
    "time/train": 2.44,
    "perf/rollout_tokens_per_s": 154.2,
    "perf/training_tokens_per_s": 1210.0,
    "grad_norm": 1.0,
    "completions/clipped_ratio": 0.1,
    "frac_reward_zero_std": 0.5,
}


def test_a_plain_step_is_one_line_in_a_fixed_order(capsys) -> None:
    with Console() as console:  # pytest's stdout is no terminal
        assert console.plain
        console.start(["model", "grpo [x]"], steps=40, done=0)
        console.progress("training", 1, 4)
        console.step(VALUES, Example("a sample"))
    assert capsys.readouterr().out.splitlines() == [
        "model",
        "grpo [x]",
        "step 12/40  reward 0.610  loss 0.0123  len 5.2  entropy 0.333  mismatch 1e-06  6.1 s  sample 154 tok/s  "
        "train 1210 tok/s  2.8 min left",  # 28 steps of 6.1 s
    ]


PAIRS = {"step": 3.0, "reward": 0.0, "loss": 0.69, "rewards/accuracies": 0.75, "rewards/margins": 0.1234}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (PAIRS, "step 3/9  accuracy 75%  margin 0.123  loss 0.6900"),
        ({"step": 3.0, "reward": 1.0, "loss": 1.5, "perplexity": 4.4817}, "step 3/9  perplexity 4.482  loss 1.5000"),
        (
            {"step": 3.0, "reward": 0.5, "rewards/chosen": 0.25, "rewards/rejected": -1.5},
            "step 3/9  desirable 0.250  undesirable -1.500",
        ),
        ({"step": 3.0, "reward": -1.0, "rewards/rejected": -1.5}, "step 3/9  undesirable -1.500"),
    ],
    ids=["pairs", "sft", "kto", "kto_one_side"],
)
def test_a_run_over_recorded_completions_shows_what_it_is_judged_by(values, shown: str, capsys) -> None:
    with Console() as console:
        console.start([], steps=9)
        console.step(values, None)
    assert capsys.readouterr().out == shown + "\n"


def test_each_reward_function_has_a_row_where_there_is_more_than_one() -> None:
    one = {"reward": 0.5, "rewards/number/mean": 0.5, "rewards/number/std": 0.1}
    assert "number" not in drawn(one) and "0.500" in drawn(one)
    two = drawn(one | {"rewards/a_very_long_name_of_one/mean": 0.25})
    assert [line.split() for line in two.splitlines()[2:5]] == [
        ["reward", "0.500"],
        ["number", "0.500"],
        ["a_very_long_na…", "0.250"],
    ]
    many = drawn({f"rewards/f{i}/mean": 0.1 for i in range(30)} | one)
    assert len(many.splitlines()) < 16


def drawn(values: dict[str, float], width: int = 80, **shown: object) -> str:
    """The panel after a step, as text."""
    panel = Panel(steps=9)
    panel.add({"step": 3.0} | values)
    for name, value in shown.items():
        setattr(panel, name, value)
    terminal = Terminal(file=io.StringIO(), width=width, height=60)
    with terminal.capture() as captured:
        terminal.print(panel)
    return captured.get().strip("\n")


def test_the_completion_has_its_prompt_reward_and_label_wrapped_at_words() -> None:
    words = "understanding " * 12
    text = drawn({"reward": 0.5}, example=Example(words, "what is it?", 0.25, "42"))
    lines = [line.strip() for line in text.splitlines()]
    assert "prompt: what is it?" in lines and "(reward 0.25, label 42)" in lines
    assert text.count("understanding") == 12 and all(len(line) <= 80 for line in lines)
    assert "(" not in drawn({"reward": 0.5}, example=Example("text")).splitlines()[-1]


def test_the_label_is_the_answer_column_as_text() -> None:
    assert label_of({"prompt": "p", "answer": 42, "label": "no"}) == "42"
    assert label_of({"label": False}) == "False" and label_of({"prompt": "p", "answer": None}) == ""
    messages = '[{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]'
    assert prompt_text(messages, True) == "hi" and prompt_text(messages, False) == messages
    assert prompt_text("[]", True) == "[]" and prompt_text("{", True) == "{"


def test_details_are_in_the_log_and_shown_only_when_asked_for(tmp_path: Path, capsys) -> None:
    for verbose in (False, True):
        log = tmp_path / f"{verbose}.txt"
        with Console(verbose=verbose) as console:
            console.note("before the log")
            console.detail("a detail \x1b[2J")
            console.phase("loading the model")
            console.keep_log(log)
            console.note("act on it", Level.WARNING)
            console.step({"step": 1.0, "loss": 0.5}, None)
        shown = capsys.readouterr().out.splitlines()
        detail = ["a detail \ufffd[2J"] if verbose else []
        assert shown == ["before the log", *detail, "! act on it", "step 1  loss 0.5000"]
        assert [line[20:] for line in log.read_text().splitlines()] == [
            "before the log",
            "a detail \ufffd[2J",
            "loading the model",
            "! act on it",
            "step 1  loss 0.5000",
        ]
        assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in log.read_text().splitlines())


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys) -> None:
    with Console() as console:
        console.keep_log(tmp_path / "missing" / "log.txt")
        console.note("goes on")
    assert capsys.readouterr().out == "goes on\n"


def test_a_phase_is_a_line_only_where_that_is_asked_for(capsys) -> None:
    with Console() as console:
        console.phase("loading", line=True)
        console.phase("starting vLLM")
    assert capsys.readouterr().out == "loading\n"


def test_the_clock_of_a_phase_starts_with_its_name(monkeypatch) -> None:
    panel, now = Panel(), [100.0]
    monkeypatch.setattr("rlft.monitor.panel.time.monotonic", lambda: now[0])
    panel.enter("starting vLLM")
    now[0] = 175.0
    panel.enter("starting vLLM")
    assert panel._bar().plain == "starting vLLM 1:15"  # type: ignore[union-attr]


def test_lines_break_at_words_and_paths_stay_whole() -> None:
    path = "/" + "long/" * 30
    assert wrap(f"adapter:        {path}", 80, 16) == f"adapter:        {path}"
    text = wrap("checkpoints:    " + "choose it with --checkpoint best " * 6, 80, 16).splitlines()
    assert len(text) > 2 and all(len(line) <= 80 for line in text)
    assert all(line.startswith(" " * 16) and line[16] != " " for line in text[1:])
    assert " ".join(" ".join(text).split()[1:]) == " ".join(["choose it with --checkpoint best"] * 6)
    assert wrap("  a   b", 80) == "  a   b"


def test_missing_metrics_are_left_out_and_the_last_step_has_nothing_left(capsys) -> None:
    with Console() as console:
        console.start([], steps=3)
        console.step({"step": 3.0, "loss": 0.5, "step_time": 1.0}, None)
    assert capsys.readouterr().out == "step 3/3  loss 0.5000  1.0 s\n"


def test_health_messages_are_printed_when_new_and_stay_in_the_live_view_while_they_apply(capsys) -> None:
    high, fell = Message("truncation", "97% cut"), Message("eval_falls", "it fell")
    with Console() as console:
        console.start([], steps=9)
        console.step({"step": 2.0, "loss": 0.5}, None, [high], [high])
        console.step({"step": 3.0, "loss": 0.5}, None, [], [high])
        console.evaluation(3, {"eval/reward": 0.5, "eval/rows": 4.0}, [fell], [high, fell])
    assert capsys.readouterr().out.splitlines() == [
        "step 2/9  loss 0.5000",
        "! step 2: 97% cut",
        "step 3/9  loss 0.5000",
        "held-out rows (4) after step 3: reward 0.5",
        "! step 3: it fell",
    ]
    file = io.StringIO()
    with Console(plain=False, terminal=Terminal(file=file, force_terminal=True, width=80)) as console:
        console.start([], 9)
        console.step({"step": 3.0, "loss": 0.5}, None, [], [high, fell])
    assert "! 97% cut" in file.getvalue() and "! it fell" in file.getvalue()


BEFORE = {
    "eval/reward": 0.31,
    "eval/reward_stderr": 0.033,
    "eval/reward_low": 0.25,
    "eval/reward_high": 0.38,
    "eval/rows": 200.0,
    "eval/completions/mean_length": 9.0,
    "eval/invalid": 0.0,
    "eval/rewards/number/mean": 0.31,
}
AFTER = {
    **BEFORE,
    "eval/reward": 0.72,
    "eval/completions/mean_length": 5.5,
    "eval/reward_change": 0.41,
    "eval/reward_change_stderr": 0.04,
}


def test_the_end_shows_before_and_after_and_where_things_are(capsys) -> None:
    best = Best(20, "eval/reward", 0.75)
    with Console() as console:
        console.finish(BEFORE, AFTER, Path("r/checkpoints/step-000040"), Path("r/report.html"), "again", best)
    assert capsys.readouterr().out.splitlines() == [
        "held-out rows: 200",
        "                                  before          after          change",
        "  reward                   0.310 ± 0.033  0.720 ± 0.033  +0.410 ± 0.040",
        "  completions/mean_length              9            5.5            -3.5",
        "checkpoints:    step 20 did best (eval/reward 0.750): choose it with --checkpoint best; being the best on "
        "these rows it looks too good on them",
        "adapter:        r/checkpoints/step-000040",
        "report:         r/report.html",
        "sample from it: again",
    ]


def test_a_last_step_that_is_the_best_needs_no_line(capsys) -> None:
    with Console() as console:
        console.finish(BEFORE, AFTER, Path("a"), Path("b"), "c", Best(40, "eval/reward", 0.72))
    assert "checkpoints:" not in capsys.readouterr().out


def test_one_evaluation_is_a_line_and_a_table() -> None:
    several = {**AFTER, "eval/samples": 8.0, "eval/pass@1": 0.72, "eval/pass@8": 0.9, "eval/pass@8_stderr": 0.02}
    assert evaluation_line(several, 40) == (
        "held-out rows (200) after step 40: reward (avg@8) 0.720 ± 0.033 (+0.410 ± 0.040 since the first), "
        "pass@8 0.900 ± 0.020"
    )
    assert evaluation_rows(several) == [
        ("", "value", "stderr", "95% interval"),
        ("reward (avg@8)", "0.720", "0.033", "0.250 to 0.380"),
        ("pass@8", "0.900", "0.020", ""),
        ("completions/mean_length", "5.500", "", ""),
    ]


def test_without_evaluation_the_end_has_no_table(capsys) -> None:
    with Console() as console:
        console.finish({}, {}, Path("a"), Path("b"), "c")
    assert capsys.readouterr().out.splitlines() == ["adapter:        a", "report:         b", "sample from it: c"]


def test_an_evaluation_on_one_side_only_shows_a_dash(capsys) -> None:
    with Console() as console:
        console.finish({"eval/reward": 0.5, "eval/rows": 4.0}, {}, Path("a"), Path("b"), "c")
    assert capsys.readouterr().out.splitlines()[2] == "  reward     0.5      -"


def test_a_stdout_without_unicode_does_not_stop_a_run() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with Console(terminal=Terminal(file=out)) as console:
        console.note("0.5 ± 0.1")
    assert raw.getvalue() == b"0.5 ? 0.1\n"


def test_what_a_model_writes_cannot_steer_the_terminal(capsys) -> None:
    with Console() as console:
        console.note("a\x1b[2Jb\rc\x07")
    assert capsys.readouterr().out == "a\ufffd[2Jb\ufffdc\ufffd\n"


def test_a_forced_colour_is_no_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Console().plain


def test_small_formats() -> None:
    assert (clock(75), clock(3675), clock(59.6), clock(0)) == ("1:15", "1:01:15", "1:00", "0:00")
    assert (spark([0, 1, 7]), spark([2, 2]), spark([1])) == ("▁▂█", "▁▁", "")
    assert shorten("a\nb\nc\n", 2) == "a\nb ..." and shorten("a\nb\n", 2) == "a\nb"
    assert time_line(VALUES).plain == "6.1 s  generate 50%  train 40%  sample 154 tok/s  train 1,210 tok/s"


def test_an_error_stops_the_thread_that_draws() -> None:
    before = set(threading.enumerate())  # a thread of an earlier test may end meanwhile

    def started() -> set[threading.Thread]:
        return set(threading.enumerate()) - before

    terminal = Terminal(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Console(plain=False, terminal=terminal) as console:
        console.start([], 3)
        assert len(started()) == 1
        raise KeyboardInterrupt
    end = time.monotonic() + 5  # rich tells its thread to stop and does not wait for it
    while started() and time.monotonic() < end:
        time.sleep(0.01)
    assert not started()


SCRIPT = """
import time, sys
from pathlib import Path
from rlft.monitor.console import Console
from rlft.monitor.panel import Example
values = {VALUES}
with Console() as console:
    assert not console.plain
    console.start(["a title"], 40, 11)
    console.generating(32, 64)
    time.sleep(0.6)
    console.step(values, Example("so it is \\x1b[2J [bold]42"))
    console.note("a note")
    console.progress("training", 1, 4)
    time.sleep(0.6)
    if sys.argv[1] == "raise":
        raise KeyboardInterrupt
    if sys.argv[1] == "hang":
        print("ready", flush=True)
        time.sleep(30)
    console.finish({}, {}, Path("/" + "long/" * 30), Path("b"), "c")
""".replace("{VALUES}", repr(VALUES))


def in_terminal(how: str) -> tuple[str, int]:
    """What the script wrote to a terminal of 80 columns, and its exit status. "hang" is killed once it says so."""
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")} | {"TERM": "xterm"}
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, how], stdin=slave, stdout=slave, stderr=slave, env=env, cwd=root
    )
    os.close(slave)
    data, end = b"", time.monotonic() + 30
    try:
        while time.monotonic() < end:
            if select.select([master], [], [], 0.1)[0]:
                try:
                    data += os.read(master, 65536)
                except OSError:  # Linux's way to say that the other side is closed
                    break
            if how == "hang" and b"ready" in data:
                run.send_signal(signal.SIGKILL)
        return data.decode(), run.wait(5)
    finally:
        run.kill()
        run.wait()
        os.close(master)


@pytest.mark.parametrize(("how", "status"), [("finish", 0), ("raise", -signal.SIGINT), ("hang", -signal.SIGKILL)])
def test_the_live_view_leaves_the_terminal_as_it_was(how: str, status: int) -> None:
    out, code = in_terminal(how)
    assert code == status, out
    assert out.rfind("\x1b[?25h") > out.rfind("\x1b[?25l")  # the cursor is visible, kill -9 or not
    assert "\x1b[?1049h" not in out  # no alternate screen, so what was shown stays
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    assert "generating 32/64" in shown and "step 12/40" in shown and "training 1/4" in shown and "a note" in shown
    assert "so it is \ufffd[2J [bold]42" in shown and "\x1b[2J" not in out
    if how == "finish":
        assert "/" + "long/" * 29 in shown  # not broken: it can be copied
