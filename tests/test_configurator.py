"""Settings: defaults, files, flags, and what a user is told when they are wrong.

python -m pytest tests/test_configurator.py
"""

import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

import configurator
from eval import EvalConfig
from prepare_data import PrepareConfig
from sample import SampleConfig
from sft_gsm8k import SFTConfig
from train import TrainConfig


@dataclass
class Base:
    learning_rate: float = 6e-4  # peak, after warm-up
    steps: int = 10  # how many


@dataclass
class Config(Base):
    name: str = "a"  # a word
    flag: bool = False  # on or off
    size: int | None = None  # None: computed
    word: str | None = None  # None: nothing
    steps: int = 20  # how many, here


def parse(*argv, **kwargs):
    return configurator.parse(Config, list(argv), **kwargs)


@pytest.mark.parametrize(
    "arg, key, value",
    [
        ("--learning_rate=1", "learning_rate", 1.0),
        ("--learning_rate=1e-3", "learning_rate", 1e-3),
        ("--steps=1e5", "steps", 100000),
        ("--steps=-3", "steps", -3),
        ("--steps=9007199254740993", "steps", 9007199254740993),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
        ("--name=None", "name", "None"),
        ("--name=3", "name", "3"),
        ("--flag=True", "flag", True),
        ("--flag=false", "flag", False),
        ("--size=7", "size", 7),
        ("--size=None", "size", None),
        ("--word=None", "word", None),
        ("--word=x.py", "word", "x.py"),
    ],
)
def test_values(arg, key, value):
    cfg, set_by = parse(arg)
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
    assert set_by == {key: "command line"}


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--learning_rte=1", r"unknown key 'learning_rte' \(command line\); did you mean 'learning_rate'\?"),
        ("--zzzzzz=1", "unknown key 'zzzzzz' .*--help lists the keys"),
        ("--steps=1.5", r"steps='1.5' \(command line\): wanted int"),
        ("--steps=ten", "wanted int"),
        ("--steps=inf", "wanted int"),
        ("--steps=None", "wanted int"),
        ("--size=many", "wanted int or None"),
        ("--learning_rate=fast", "wanted float"),
        ("--flag=1", "wanted bool"),
        ("--flag", "--flag: wanted --flag=value"),
        ("steps=3", "wanted a config file"),
        ("no_such.py", "config file no_such.py not found"),
    ],
)
def test_errors(arg, message):
    with pytest.raises(ValueError, match=message):
        parse(arg)


def test_files(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import math\nfrom os import path\n_half = 0.5\ndef twice(x): return 2 * x\n"
        "learning_rate = twice(_half)\nsteps = 1e2\nname = 'f'\n"
    )
    cfg, set_by = parse("--steps=5", str(file), "--name=flag")
    assert (cfg.learning_rate, cfg.steps, cfg.name) == (1.0, 100, "flag")  # the later one wins, both ways
    assert type(cfg.learning_rate) is float and type(cfg.steps) is int
    assert set_by == {"steps": str(file), "learning_rate": str(file), "name": "command line"}
    for text, message in {
        "learning_rte = 1e-3": r"unknown key 'learning_rte' \(.*x.py\); did you mean 'learning_rate'",
        "name = 3": r"name=3 \(.*x.py\): wanted str",
        "steps = '1.5'": "wanted int",
        "steps = True": "wanted int",
        "flag = 1": "wanted bool",
        "size = [1]": "wanted int or None",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            parse(str(file))


def test_a_file_sees_nothing_of_the_script(tmp_path):
    (tmp_path / "x.py").write_text("steps = steps + 1")
    with pytest.raises(ValueError, match="config file .*x.py: NameError: name 'steps' is not defined"):
        parse(str(tmp_path / "x.py"))
    (tmp_path / "x.py").write_text("steps = = 3")
    with pytest.raises(ValueError, match="config file .*x.py: SyntaxError"):
        parse(str(tmp_path / "x.py"))


def test_positional():
    assert parse("word", positional="name")[0].name == "word"


def test_describe_names_what_differs_and_where_it_was_set():
    cfg, set_by = parse("--steps=5", "--name=a")
    text = configurator.describe(cfg, set_by)
    assert "steps = 5  (default 20, set by command line)" in text and "name" not in text
    assert configurator.describe(*parse()) == "settings: all defaults"


def test_help_comes_from_the_comments(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--learning_rate=0.0006" in out and "peak, after warm-up" in out
    assert "--steps=20" in out and "how many, here" in out


@pytest.mark.parametrize("config_class", [TrainConfig, SFTConfig, SampleConfig, EvalConfig, PrepareConfig])
def test_every_key_of_every_script_is_explained(config_class):
    for line in configurator.help_text(config_class).split("Keys, with their defaults:\n")[1].splitlines():
        assert len(line.split(None, 1)) == 2 and len(line.split(None, 1)[1]) > 3, line


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda p: p.name)
def test_shipped_configs_parse(path):
    config_class = {"sft": SFTConfig, "eval": EvalConfig}.get(path.stem.split("_")[0], TrainConfig)
    cfg, set_by = configurator.parse(config_class, [str(path)])
    assert set_by and path.read_text().startswith(('"""', "#"))


@pytest.mark.parametrize(
    "command",
    [
        "train.py --learning_rte=1",
        "train.py --max_steps=ten",
        "train.py no_such.py",
        "train.py --data_dir=nowhere",
        "sample.py --out_dir=nowhere",
        "prepare_data.py shakespear",
        "prepare_data.py text",
        "prepare_data.py text --source=nowhere",
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(command):
    result = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    code = "import configurator, numpy\nconfigurator.run(lambda: numpy.zeros(2).reshape(3))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" in result.stderr
