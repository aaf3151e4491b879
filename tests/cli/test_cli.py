"""The command line: flags over a file, help, exit codes, and messages that reach the user as they were written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlft import environment
from rlft.algos.losses.grpo import Grpo
from rlft.cli import main as cli
from rlft.cli.main import main, parse
from rlft.config.data import Reward
from rlft.config.files import to_toml
from rlft.config.run import Algo, Config
from rlft.environment import outside_window, release, version_problems, window
from rlft.errors import ConfigError, EngineError, ParityError, RewardError, RlftError

RUN = """
model = "m"
data = "d.jsonl"
out = "runs/a"
steps = 3
rewards = ["number", { use = "r.py:f", weight = 0.5, args = { a = 1 } }]
[algo]
name = "grpo"
clip_high = 0.28
[optim]
lr = 2e-5
"""


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return str(path)


def test_without_flags_the_config_is_the_files_with_the_algorithms_settings_written_out(run_file: str) -> None:
    cfg, resume = parse("train", [run_file])
    # What is None by default and by value is left out, since TOML has no null.
    written = {k: v for k, v in vars(Grpo(clip_high=0.28)).items() if v is not None}
    assert cfg.algo == Algo("grpo", written) and {"advantage", "clip_low", "kl", "correction_cap"} <= written.keys()
    assert to_toml(cfg).split("[algo]")[0] == to_toml(Config.load(run_file)).split("[algo]")[0]
    assert resume is False


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(run_file: str) -> None:
    flags = ["--optim.lr=1e-4", "--sampling.group_size", "4", "--lora.targets", "q_proj", "v_proj", "--resume"]
    cfg, resume = parse("train", [run_file, *flags])
    assert (cfg.optim.lr, cfg.sampling.group_size, cfg.lora.targets, resume) == (1e-4, 4, ("q_proj", "v_proj"), True)
    assert (cfg.steps, cfg.optim.betas) == (3, (0.9, 0.999))


def test_flags_reach_lists_and_tables_of_the_file(run_file: str) -> None:
    cfg, _ = parse("train", [run_file, "--rewards.1.weight=2", "--rewards.1.args.a", "7", "--algo.clip_high=0.3"])
    assert cfg.rewards == (Reward("number"), Reward("r.py:f", weight=2.0, args={"a": 7}))
    assert cfg.algo.options["clip_high"] == 0.3


def test_a_flag_can_take_back_what_the_file_says(run_file: str) -> None:
    cfg, _ = parse("train", [run_file, "--steps", "None", "--data.epochs", "2"])
    assert (cfg.steps, cfg.data.epochs) == (None, 2.0)


def test_a_file_may_lack_what_a_flag_gives(tmp_path: Path) -> None:
    path = tmp_path / "part.toml"
    path.write_text('model = "m"\n')
    cfg, _ = parse("train", [str(path), "--out=o", "--data.path=d", "--steps=1"])
    assert (cfg.model, cfg.out, cfg.data.path, cfg.steps) == ("m", "o", "d", 1)


def test_the_algorithms_flags_are_those_of_the_algorithm_that_is_asked_for(run_file: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain.toml"
    plain.write_text(RUN.replace("clip_high = 0.28\n", ""))
    cfg, _ = parse("train", [str(plain), "--algo.name", "sft", "--algo.aggregation=sequence_mean"])
    assert cfg.algo == Algo("sft", {"aggregation": "sequence_mean"})
    with pytest.raises(ConfigError, match=r"^algo\.clip_high: unknown setting\. Known here: name, aggregation$"):
        parse("train", [str(plain), "--algo.name=sft", "--algo.clip_high=0.3"])
    # What the file sets for another algorithm is not dropped in silence.
    with pytest.raises(ConfigError, match=r"^algo\.clip_high: unknown setting\. Known here: name, aggregation$"):
        parse("train", [run_file, "--algo.name=sft"])


def test_a_check_of_two_settings_is_made_after_the_flags(run_file: str) -> None:
    with pytest.raises(ConfigError, match=r"^steps = 3 and data\.epochs = 1\.0: give exactly one of them$"):
        parse("train", [run_file, "--data.epochs=1"])
    with pytest.raises(ConfigError, match=r"^optim\.lr = -1: want at least 0$"):
        parse("train", [run_file, "--optim.lr=-1"])


def test_a_flag_with_trls_name_gives_ours(run_file: str) -> None:
    with pytest.raises(ConfigError, match=r"^learning_rate: unknown setting\. TRL's learning_rate is optim\.lr here$"):
        parse("train", [run_file, "--learning-rate=1"])
    with pytest.raises(ConfigError, match=r"^lr: unknown setting\. Did you mean optim\.lr\?$"):
        parse("train", [run_file, "--lr", "1"])


def test_a_flag_that_does_not_exist_is_unknown_before_its_value_is_missed(run_file: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.lrr: unknown setting\. Did you mean \"lr\"\?$"):
        parse("train", [run_file, "--optim.lrr"])
    with pytest.raises(ConfigError, match=r"^--optim\.lr: a value is missing"):
        parse("train", [run_file, "--optim.lr"])


def test_resume_is_a_flag_and_no_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("resume = true\n" + RUN)
    with pytest.raises(ConfigError, match=r"^resume: unknown setting\. Use the flag --resume, which goes on from"):
        parse("train", [str(path)])


def test_the_file_comes_first() -> None:
    with pytest.raises(ConfigError, match=r"^the config file comes first: rlft train FILE "):
        parse("train", ["--steps=3"])


def test_help_of_train_is_a_manual_with_the_algorithms_settings(
    run_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", run_file, "--help"])
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)  # lines and boxes are as wide as the terminal
    assert exit_.value.code == 0
    clip = "The ratio is clipped at 1 + clip_high. (default: 0.28)"
    for expected in ("--algo.clip_high", clip, "--resume", "--optim.lr", "Learning rate after warm-up."):
        assert expected in text


def test_help_without_a_file_shows_what_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--help"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.count("(required)") == 2


@pytest.mark.parametrize("line", ['optim = {lr = "fast"}', "algo = {clip_hgih = 0.3}"])
def test_help_of_a_file_with_a_fault_names_the_fault(line: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\ndata = "d"\nout = "o"\nsteps = 1\n' + line)
    with pytest.raises(
        ConfigError, match=r"^(optim\.lr = \"fast\": want a number|algo\.clip_hgih: unknown setting\. )"
    ):
        parse("train", [str(path), "--help"])


def test_rlft_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; t = time.process_time(); from rlft.cli.main import main; assert main(['--help']) == 0\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert time.process_time() - t < 1"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in cli.COMMANDS:
        assert f"rlft {command}" in run.stdout


def test_a_mistyped_command_is_named_with_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    wanted = f'error: no command "trian". Did you mean "train"? Commands: {", ".join(cli.COMMANDS)}; see rlft --help\n'
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("a"), 2), (RewardError("b"), 2), (ParityError("c"), 3), (EngineError("d"), 1), (RlftError("e"), 1)],
)
def test_an_error_of_ours_is_one_message_and_its_exit_code(
    error: RlftError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(args: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(command, "", ""))
    assert main(["train"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_reward_that_failed_later_exits_as_a_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(args: list[str]) -> int:
        error = RewardError("everything invalid")
        error.exit_code = 3
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(command, "", ""))
    assert main(["train"]) == 3


def test_an_interrupt_exits_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(args: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(command, "", ""))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_sigterm_is_an_interrupt_and_its_handler_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(args: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli.COMMANDS, "train", cli.Command(command, "", ""))
    assert main(["train"]) == 130 and signal.getsignal(signal.SIGTERM) is before


def test_a_bug_of_ours_is_a_short_traceback_and_where_to_take_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlft.environment.describe", lambda: {}["cpu"] if json.loads("{}") else json.loads("{"))
    assert main(["env"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("error: JSONDecodeError: Expecting property name")
    assert lines[-1] == cli.REPORT and sum('  File "' in line for line in lines) == 4


def test_a_reader_that_goes_away_and_a_full_output_are_no_traceback() -> None:
    for command, code, told in (
        ("rlft env | true; exit ${PIPESTATUS[0]}", 1, ""),
        ("rlft env >/dev/full", 1, "error: the output cannot be written: No space left on device\n"),
    ):
        script = command.replace("rlft", f"{sys.executable} -m rlft")
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
        assert (run.returncode, run.stderr) == (code, told)


def test_every_command_has_a_help_of_its_own(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in cli.COMMANDS:
        for flags in (["--help"], ["-h"]):
            try:
                code = main([name, *flags])
            except SystemExit as error:
                code = error.code
            text = capsys.readouterr().out
            assert code == 0 and text.startswith(f"usage: rlft {name}"), name
            assert " ".join(cli.COMMANDS[name].about.split()[:6]) in " ".join(text.split()), name
            # Types in words, nothing of ours that is not for users.
            for ugly in ("{None}", "MISSING", "dataclass", "functools"):
                assert ugly not in text, (name, ugly)
            assert max(map(len, text.splitlines()[1:])) <= 80, name


def test_brackets_in_a_message_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "[bold]run.toml"
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: cannot be read: No such file or directory\n"


def test_report_of_a_folder_without_a_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: not the folder of a run (it has no metrics.jsonl)\n"


def test_report_writes_the_page_of_a_run_and_of_several_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    monkeypatch.chdir(tmp_path)
    for args, page in ((["a"], "a/report.html"), (["a", "--out", "x.html"], "x.html"), (["a", "b"], "comparison.html")):
        assert main(["report", *args]) == 0
        assert capsys.readouterr().out == f"{page}\n" and (tmp_path / page).is_file()
    assert main(["report", "a", "c"]) == 2 and "c: not the folder of a run" in capsys.readouterr().err
    assert main(["report"]) == 2 and "give the folder of a run" in capsys.readouterr().err


def test_validate_prints_every_fault_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace("steps = 3", "stepz = 3\nseed = 'x'"))
    assert main(["validate", str(path)]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "2 problems:",
        '  stepz: unknown setting. Did you mean "steps"?',
        '  seed = "x": want a whole number',
    ]


def test_env_shows_versions_windows_and_the_command_that_adds_what_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    have = environment.version("torch")
    assert f"torch          {have:<14}tested {environment.tested('torch')}\n" in text
    assert "pip install 'wandb>=0.31'" in text or "\nwandb " in text


def test_a_version_is_compared_by_its_numbers() -> None:
    assert release("2.13.0+cpu") == (2, 13, 0)
    assert release("6.0.0.dev0") == (6, 0, 0)
    assert window("transformers") == ">=5.17,<6"
    assert [outside_window("transformers", v) for v in ("5.9.1", "5.17.0", "5.100", "6.0.0")] == [
        True,
        False,
        False,
        True,
    ]
    assert not outside_window("torch", "3.0")


def test_a_package_that_is_missing_is_a_problem_only_where_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment.VERSIONS, "rlft-not-there", ("1", "1.5", "2"))
    assert version_problems(()) == []
    wanted = "rlft-not-there is not installed: pip install 'rlft-not-there>=1,<2'"
    assert version_problems(("rlft-not-there",)) == [wanted]


def test_an_installed_package_outside_its_window_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment.VERSIONS, "pyyaml", ("1", "1.5", "2"))
    have = environment.version("pyyaml")
    wanted = f"pyyaml {have} is outside the tested window >=1,<2: pip install 'pyyaml>=1,<2'"
    assert version_problems() == [wanted]
