"""Config files: what is read, what is refused and in which words, and that what is written reads back equal."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from rlft.config import files as config_file
from rlft.config import section, trl_names
from rlft.config.data import Data, Eval, Reward, Sampling, Source
from rlft.config.files import to_toml
from rlft.config.run import Algo, Checkpoint, Config, Lora, Optim
from rlft.config.section import EXAMPLES, SECTIONS, options_of, paths
from rlft.errors import ConfigError

RUN: dict[str, Any] = {"model": "m", "data": "d.jsonl", "out": "runs/a", "steps": 3}


def config(**table: Any) -> Config:
    return Config(**{**RUN, **table})


def assert_refused(match: str, **table: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(match)}$"):
        config(**table)


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_toml_file_becomes_the_config_it_says(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "run.toml",
        """
        model = "Qwen/Qwen3-0.6B"
        rewards = ["number", { use = "r.py:f", weight = 0.5, args = { a = 1 } }]
        steps = 7
        out = "runs/a"
        [data]
        path = "d.jsonl"
        columns = { prompt = "question" }
        sources = []
        [algo]
        name = "grpo"
        clip_high = 0.28
        [optim]
        lr = 1
        betas = [0.9, 0.99]
        [lora]
        targets = ["q_proj", "v_proj"]
        [eval]
        rows = 5
        data = "e.jsonl"
        rewards = ["exact"]
        """,
    )
    assert Config.load(path) == Config(
        model="Qwen/Qwen3-0.6B",
        data=Data(path="d.jsonl", columns={"prompt": "question"}),
        out="runs/a",
        rewards=(Reward("number"), Reward("r.py:f", weight=0.5, args={"a": 1})),
        steps=7,
        algo=Algo("grpo", {"clip_high": 0.28}),
        optim=Optim(lr=1.0, betas=(0.9, 0.99)),
        lora=Lora(targets=("q_proj", "v_proj")),
        eval=Eval(rows=5, data=Data(path="e.jsonl"), rewards=(Reward("exact"),)),
    )


def test_a_list_of_reward_tables_and_plain_strings_are_the_same_rewards() -> None:
    assert config(rewards=["number"]) == config(rewards=[{"use": "number"}])
    assert config(algo="sft").algo == Algo("sft") == config(algo={"name": "sft"}).algo
    assert config(data={"path": "d.jsonl"}) == config()


def test_yaml_reads_a_number_that_its_parser_takes_for_a_string(tmp_path: Path) -> None:
    text = "model: m\ndata: d.jsonl\nout: o\nsteps: 2\noptim: {lr: 1e-6, eps: 1e-9}\nlora: {alpha: 8}\n"
    cfg = Config.load(write(tmp_path, "run.yaml", text))
    assert (cfg.optim.lr, cfg.optim.eps, cfg.lora.alpha) == (1e-6, 1e-9, 8.0)
    assert type(cfg.lora.alpha) is float


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    cfg = Config(
        model='a "quoted"\\name',
        data=Data(
            sources=(Source("a.jsonl", 0.25, args={"deep": {"list": [1, "x"]}}), Source("b.jsonl")),
            columns={"prompt": "the question", "a.b": "c"},
            system='two\nlines, a tab\t, ü, 🙂, "quotes" and \x7f',
            chat_template_kwargs={"enable_thinking": False},
            epochs=1.5,
        ),
        out="runs/a",
        rewards=(Reward("number", weight=1e-05), Reward("r.py:f", memory_mb=64, args={"a": {"b": [1, 2.5]}, "c": "x"})),
        algo=Algo("grpo", {"clip_high": 0.28, "kl": "k2", "table": {"x": 1}, "empty": {}}),
        sampling=Sampling(stop_token_ids=(1, 2)),
        optim=Optim(lr=1e-05),
        lora=Lora(targets=("q_proj",)),
        eval=Eval(rows=3, data=Data(path="e.jsonl", args={"size": 9}), rewards=(Reward("exact", args={"k": []}),)),
        checkpoint=Checkpoint(every=2),
    )
    text = to_toml(cfg)
    assert Config.load(write(tmp_path, "config.toml", text)) == cfg
    # Every value is in the file, those that were never set too.
    assert tomllib.loads(text)["packing"] == {
        "tokens_per_micro_batch": "auto",
        "share_prefix": True,
        "skip_zero_advantage": True,
    }


def test_a_config_with_defaults_only_reads_back_equal() -> None:
    assert Config(**tomllib.loads(to_toml(config()))) == config()


def test_a_value_that_toml_cannot_hold_is_refused_by_name() -> None:
    cfg = dataclasses.replace(config(), data=Data(path="d", args={"seed": None}))
    with pytest.raises(ConfigError, match=r"^data\.args\.seed = None: a config file cannot hold this value; leave it"):
        to_toml(cfg)


def test_an_unknown_key_names_its_nearest_neighbour() -> None:
    assert_refused('stepz: unknown setting. Did you mean "steps"?', stepz=1)
    assert_refused('sampling.groupsize: unknown setting. Did you mean "group_size"?', sampling={"groupsize": 1})
    assert_refused(
        'data.sources[0].pth: unknown setting. Did you mean "path"?', data={"sources": [{"path": "a", "pth": 1}]}
    )


def test_a_key_like_nothing_lists_what_is_known() -> None:
    assert_refused("checkpoint.zzz: unknown setting. Known here: every, minutes, keep", checkpoint={"zzz": 1})


def test_a_key_outside_its_section_says_where_it_belongs() -> None:
    assert_refused("lr: unknown setting. Did you mean optim.lr?", lr=1)
    assert_refused("group_size: unknown setting. Did you mean sampling.group_size?", group_size=8)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("num_generations", "sampling.group_size"),
        ("learning_rate", "optim.lr"),
        ("beta", "algo.kl_coef"),
        ("temperature", "sampling.temperature"),
        ("output_dir", "out"),
    ],
)
def test_a_trl_name_gives_ours(theirs: str, ours: str) -> None:
    assert_refused(f"{theirs}: unknown setting. TRL's {theirs} is {ours} here", **{theirs: 1})


def test_a_trl_name_in_a_section_gives_ours() -> None:
    assert_refused(
        "optim.learning_rate: unknown setting. TRL's learning_rate is optim.lr here", optim={"learning_rate": 1e-5}
    )


def test_a_trl_setting_without_a_counterpart_says_what_to_do_instead() -> None:
    assert_refused(
        "report_to: unknown setting. TRL's report_to is track.use here: a list of trackers", report_to="wandb"
    )


def test_every_name_that_the_trl_table_gives_exists() -> None:
    from rlft.algos.algorithm import LOSSES, loss_class
    from rlft.config.resolve import names_in

    losses = [loss_class(name) for name in names_in(LOSSES)]
    ours = {*paths(), *(f"algo.{f.name}" for loss in losses for f in dataclasses.fields(loss))}
    assert {each.ours for each in trl_names.TRL_NAMES.values()} <= ours


def test_no_setting_of_ours_is_refused_as_a_name_of_trl() -> None:
    top = {f.name for f in dataclasses.fields(Config)}
    assert not top & {*trl_names.TRL_NAMES, *trl_names.TRL_NOTES}


@pytest.mark.parametrize(
    ("message", "table"),
    [
        ('steps = "3": want a whole number', {"steps": "3"}),
        ("steps = true: want a whole number", {"steps": True}),
        ("steps = 2.0: want a whole number", {"steps": 2.0}),
        ("optim.lr = true: want a number", {"optim": {"lr": True}}),
        ('optim.lr = "fast": want a number', {"optim": {"lr": "fast"}}),
        ("model = 3: want a string", {"model": 3}),
        ("packing.share_prefix = 1: want true or false", {"packing": {"share_prefix": 1}}),
        ("optim.betas = [0.9]: want a list of 2: a number, a number", {"optim": {"betas": [0.9]}}),
        ("optim.betas[1] = false: want a number", {"optim": {"betas": [0.9, False]}}),
        ("sampling.stop_token_ids = 3: want a list, each item a whole number", {"sampling": {"stop_token_ids": 3}}),
        ("lora.targets[1] = 2: want a string", {"lora": {"targets": ["q_proj", 2]}}),
        ('lora.targets = 3: want a list, each item a string or "all-linear"', {"lora": {"targets": 3}}),
        (
            'optim.name = "adamw_8bits": want "adamw" or "adamw_8bit". Did you mean "adamw_8bit"?',
            {"optim": {"name": "adamw_8bits"}},
        ),
        ("checkpoint = 3: want a table with every, minutes, keep", {"checkpoint": 3}),
        ("data.columns.prompt = 3: want a string", {"data": {"path": "d", "columns": {"prompt": 3}}}),
        ("data.args = 3: want a table", {"data": {"path": "d", "args": 3}}),
        (
            'rewards[1].use is missing: it has no default; for example use = "number"',
            {"rewards": ["number", {"weight": 2.0}]},
        ),
        (
            "rewards[0] = 3: want a string (use) or a table with use, weight, timeout, memory_mb, file_mb, env, "
            "network, batch, args",
            {"rewards": [3]},
        ),
    ],
)
def test_a_wrong_type_names_field_value_and_what_is_wanted(message: str, table: dict[str, Any]) -> None:
    assert_refused(message, **table)


def test_all_faults_of_a_file_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Config(**{"model": "m", "out": "o", "stepz": 3, "optim": {"lr": "x", "name": 1}, "lora": {"rank": 0}})
    assert str(error.value).splitlines() == [
        'stepz: unknown setting. Did you mean "steps"?',
        'optim.lr = "x": want a number',
        'optim.name = 1: want "adamw" or "adamw_8bit"',
        "lora.rank = 0: want at least 1, at most 65536",
        'data is missing: it has no default; for example data = "train.jsonl"',
    ]


def test_every_setting_without_a_default_has_an_example() -> None:
    for cls in SECTIONS:
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            if field.init and field.default is field.default_factory is dataclasses.MISSING:
                assert field.name in EXAMPLES, f"{cls.__name__}.{field.name}"
    with pytest.raises(ConfigError) as error:
        Config(steps=1)  # type: ignore[call-arg]
    missing = str(error.value).splitlines()
    assert [line.partition(" ")[0] for line in missing] == ["model", "data", "out"]
    assert all(re.search(r"is missing: it has no default; for example \w+ = \".+\"$", line) for line in missing)


@pytest.mark.parametrize(
    ("message", "table"),
    [
        ("steps = 3 and data.epochs = 1.0: give exactly one of them", {"data": {"path": "d", "epochs": 1}}),
        ("data.path = '': give one of data.path, data.sources and data.rows", {"data": {}}),
        ("sampling.group_size = 0: want at least 1", {"sampling": {"group_size": 0}}),
        (
            "lora.targets = 'lm_head': an adapter on the head or the embedding is not supported: rollouts could not be "
            "checked against it",
            {"lora": {"targets": ["lm_head"]}},
        ),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_its_section(message: str, table: dict[str, Any]) -> None:
    assert_refused(message, **table)


def test_steps_or_epochs_must_be_given() -> None:
    table = {k: v for k, v in RUN.items() if k != "steps"}
    with pytest.raises(ConfigError, match=r"^steps = None and data\.epochs = None: give exactly one of them$"):
        Config(**table)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read: No such file or directory$"):
        Config.load(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match=r"run\.json: a config file ends in \.toml, \.yaml or \.yml$"):
        Config.load(write(tmp_path, "run.json", "{}"))
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: .*line 2"):
        Config.load(write(tmp_path, "bad.toml", 'model = "m"\nsteps = = 3\n'))
    with pytest.raises(ConfigError, match=r"(?s)bad\.yaml: not valid YAML: .*line 2"):
        Config.load(write(tmp_path, "bad.yaml", "model: m\nsteps: [3\n"))
    with pytest.raises(ConfigError, match=r"list\.yaml: want settings at the top"):
        Config.load(write(tmp_path, "list.yaml", "- model\n"))


@dataclass(frozen=True)
class Loss:
    """An algorithm's own settings, as a loss file has them."""

    kl: Literal["k2", "k3"] = "k2"
    cap: float | None = 2.0

    def __post_init__(self) -> None:
        if self.cap is not None and self.cap < 1:
            raise ConfigError(f"algo.cap = {self.cap}: want 1 or more")


def test_any_frozen_dataclass_is_built_in_the_same_way() -> None:
    assert options_of(Loss, {"cap": "1e1"}, "algo") == Loss("k2", 10.0)
    assert options_of(Loss, {"cap": None}, "algo") == Loss("k2", None)
    with pytest.raises(ConfigError, match=r'^algo\.kl = "k4": want "k2" or "k3"$'):
        options_of(Loss, {"kl": "k4"}, "algo")
    with pytest.raises(ConfigError, match=r"^algo\.cap = 0\.5: want 1 or more$"):
        options_of(Loss, {"cap": 0.5}, "algo")


def test_none_where_it_is_not_the_default_survives_the_table() -> None:
    assert config_file.to_table(Loss(cap=None)) == {"kl": "k2", "cap": None}
    assert "subset" not in config_file.to_table(Data(path="d"))


def test_every_setting_that_trl_adds_to_the_trainer_has_a_hint() -> None:
    from transformers import TrainingArguments
    from trl import DPOConfig, GRPOConfig, SFTConfig

    base = {field.name for field in dataclasses.fields(TrainingArguments)}
    theirs = {field.name for cls in (GRPOConfig, DPOConfig, SFTConfig) for field in dataclasses.fields(cls)} - base
    ours = {path.rpartition(".")[2] for path in paths()} | {field.name for field in dataclasses.fields(Config)}
    hints = {name: section.unknown(name, "", [], 1) for name in theirs - ours}
    assert [name for name, hint in hints.items() if "Known here" in hint or "Did you mean" in hint] == []


def test_one_text_stands_for_a_list_of_one() -> None:
    lists = {"rewards": "number", "track": {"use": "wandb"}, "lora": {"targets": "q_proj"}, "sampling": {"stop": "x"}}
    cfg = Config(**{**RUN, **lists})
    assert (cfg.rewards, cfg.track.use) == ((Reward("number"),), ("wandb",))
    assert (cfg.lora.targets, cfg.sampling.stop) == (("q_proj",), ("x",))
    assert Config(**{**RUN, "rewards": {"use": "number", "weight": 2}}).rewards == (Reward("number", weight=2.0),)
    assert Config(**RUN).lora.targets == "all-linear"


def test_what_a_preset_sets_is_not_taken_for_a_setting_of_the_user() -> None:
    told = "lower the first or raise the second (optim.minibatches: set by the preset)"
    with pytest.raises(ConfigError, match=re.escape(told)):
        Config(**{**RUN, "algo": "dapo", "prompts_per_step": 4})
    with pytest.raises(ConfigError, match=r"raise the second$"):
        Config(**{**RUN, "algo": "dapo", "prompts_per_step": 4, "optim": {"minibatches": 5}})
