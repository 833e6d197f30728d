"""Settings: defaults, files, flags, and what a user is told when they are wrong."""

import os
import shutil
import subprocess
import sys
import typing
from dataclasses import dataclass, fields

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import configurator
from eval import EvalConfig
from extras.ablations import AblationsConfig
from extras.bench import BenchConfig
from extras.convert import ConvertConfig
from extras.sinks import SinksConfig
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


VALUES = {
    "--learning_rate=1": 1.0, "--learning_rate=1e-3": 1e-3, "--steps=1e5": 100000, "--steps=-3": -3,
    "--steps=9007199254740993": 9007199254740993, "--name=a=b": "a=b", "--name=": "", "--name=None": "None",
    "--name=3": "3", "--flag=True": True, "--flag=false": False, "--size=7": 7, "--size=None": None,
    "--word=None": None, "--word=x.py": "x.py",
}  # fmt: skip
ERRORS = {  # of flags, and of lines in a file, which have spaces
    "--learning_rte=1": r"unknown key 'learning_rte' \(command line\); did you mean --learning_rate=",
    "--steps=1.5": r"steps='1.5' \(command line\): wanted int$", "--steps=ten": "wanted int",
    "--steps=inf": "wanted int", "--steps=1e30": "wanted int", "--steps=None": "wanted int",
    "--size=many": r"wanted int \| None", "--learning_rate=fast": "wanted float", "--flag=1": "wanted bool",
    "steps=3": "did you mean --steps=", "--lr=1": "did you mean --learning_rate=",  # a name of other projects
    "no_such.py": "config file no_such.py: FileNotFoundError",
    "learning_rte = 1e-3": r"unknown key 'learning_rte' \(.*x.py\); did you mean --learning_rate=",
    "name = 3": r"name=3 \(.*x.py\): wanted str", "steps = '1.5'": "wanted int", "steps = True": "wanted int",
    "flag = 1": "wanted bool", "size = [1]": "wanted int", "steps = = 3": "config file .*x.py: SyntaxError",
    "steps = steps + 1": "config file .*x.py: NameError: name 'steps' is not defined",
}  # fmt: skip


@pytest.mark.parametrize("arg", VALUES)
def test_a_flag_becomes_the_type_of_its_field(arg):
    key, value = arg[2:].split("=")[0], VALUES[arg]
    cfg, set_by = parse("--flag=True", "--size=5", "--word=w", "--name=n", arg)
    assert getattr(cfg, key) == value and type(getattr(cfg, key)) is type(value)
    assert set(set_by.values()) == {"command line"}


def test_a_flag_without_an_equals_sign():
    """--flag alone is True; other keys take the next word."""
    argv = ["--flag", "--steps", "-5", "--name", "a=b", "--learning_rate=2", "word"]
    cfg, set_by = parse(*argv, positional="word")
    assert cfg == Config(learning_rate=2.0, name="a=b", flag=True, steps=-5, word="word")
    assert set(set_by) == {"flag", "steps", "name", "learning_rate", "word"}
    for argv in ["--steps", "--flag"], ["--steps"]:
        with pytest.raises(ValueError, match="--steps has no value; wanted --steps=VALUE"):
            parse(*argv)
    assert parse("--name=--flag")[0].name == "--flag"


@pytest.mark.parametrize("text", ERRORS)
def test_errors_say_what_was_wanted_and_where_it_was_set(text, tmp_path):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ValueError, match=ERRORS[text]):
        parse(str(tmp_path / "x.py") if " " in text else text)


def test_files_and_flags_override_each_other_from_left_to_right(tmp_path):
    file = tmp_path / "x.py"
    lines = "import math\n_half = 0.5\ndef twice(x): return 2 * x\nlearning_rate = twice(_half)"
    file.write_text(lines + "\nsteps = 1e2\nname = 'f'")
    cfg, set_by = parse("--steps=5", str(file), "--name=flag")
    assert (cfg.learning_rate, cfg.steps, cfg.name) == (1.0, 100, "flag") and type(cfg.steps) is int
    assert set_by == {"steps": str(file), "learning_rate": str(file), "name": "command line"}
    lines = configurator.describe(cfg, set_by | {"size": "nowhere"}).splitlines()
    assert len(lines) == 4  # size is the default
    assert lines[1] == f"  steps = 100  (default 20, set by {file})"
    assert parse("word", positional="name")[0].name == "word"


def test_help_shows_each_key_once_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--steps=ten", "--help")
    doc, keys = capsys.readouterr().out.split("Keys:\n")
    assert stop.value.code == 0 and doc.startswith("Settings: defaults, files, flags")
    lines = ["learning_rate: float = 6e-4  # peak, after warm-up", "steps: int = 20  # how many, here"]
    assert keys.splitlines()[:2] == [f"  --{line}" for line in lines] and keys.count("--steps") == 1


SCRIPTS = [TrainConfig, SFTConfig, SampleConfig, EvalConfig, PrepareConfig]
SCRIPTS += [AblationsConfig, BenchConfig, ConvertConfig, SinksConfig]


@pytest.mark.parametrize("config_class", SCRIPTS)
def test_every_key_of_every_script_is_explained(config_class):
    lines = configurator.help_text(config_class).split("Keys:\n")[1].splitlines()
    assert {line.split(":")[0] for line in lines} == {f"  --{field.name}" for field in fields(config_class)}
    assert all(len(line.split("  # ")[1]) > 3 for line in lines)


@st.composite
def command_lines(draw):
    """Keys exist or nearly do, and values are anything."""
    config_class = draw(st.sampled_from(SCRIPTS))
    names = [field.name for field in fields(config_class)]
    text = st.text(st.characters(exclude_categories=()), max_size=30)  # control characters, broken UTF-8
    numbers = st.one_of(st.floats(), st.integers(-2, 9), st.integers()).map(str)
    value = st.one_of(text, numbers, st.sampled_from(["None", "True", "9" * 500, "1e999"]))
    pair = st.builds("--{}={}".format, st.one_of(st.sampled_from(names), text), value)
    return config_class, draw(st.lists(st.one_of(pair, pair, text), max_size=4))


@settings(max_examples=1000, derandomize=True, deadline=None, suppress_health_check=[*HealthCheck])
@given(case=command_lines())
def test_any_command_line_is_a_config_or_one_line(case, capfd):
    config_class, argv = case
    assume(not {"-h", "--help"} & set(argv))
    hints = typing.get_type_hints(config_class)

    def main():
        cfg, set_by = configurator.parse(config_class, argv)
        configurator.describe(cfg, set_by)
        for name in set_by:
            assert isinstance(getattr(cfg, name), hints[name])

    capfd.readouterr()
    try:
        configurator.run(main)
    except SystemExit as stop:  # anything else is raised
        (line,) = capfd.readouterr().err.splitlines()
        assert stop.code == 2 and line.startswith("error: ") and len(line) > 20


CONFIGS = "ablation adapt_qwen2.5 adapt_smollm2 adapt_smollm2_gpu pretrain_472m sft_arithmetic sft_gsm8k "
CONFIGS += "shakespeare stories tinystories_34m wikitext2"  # and not those of a user


@pytest.mark.parametrize("name", CONFIGS.split())
def test_shipped_configs_parse(name):
    config_class = SFTConfig if name.startswith("sft") else TrainConfig
    assert configurator.parse(config_class, [str(ROOT / "config" / f"{name}.py")])[1]


SCRIPT = r"""
import sys
sys.path.insert(0, ".venv")
import configurator, extras.helper, library
def ours(): raise ValueError("wanted\n  this")
def interrupt(): raise KeyboardInterrupt
def file(): open("nowhere/x")
def bug(): [][0]
def text(): print("\u220e")
extra, library = extras.helper.fail, library.fail
configurator.run(globals()[sys.argv[1]])
"""
RUNS = {
    "ours": (2, "error: wanted this\n"), "extra": (2, "error: of a helper\n"), "interrupt": (130, ""),
    "file": (2, "error: [Errno 2] No such file or directory: 'nowhere/x'\n"), "text": (0, ""),
    "library": (1, "Traceback"), "bug": (1, "Traceback"),
}  # fmt: skip


def start(folder, kind, stdout=subprocess.PIPE):
    """Runs SCRIPT in a project that has a configurator, an extra, and a library in .venv."""
    shutil.copy(ROOT / "configurator.py", folder)
    fail = "def fail():\n    raise ValueError('of a helper')"
    for name, text in {"script.py": SCRIPT, "extras/helper.py": fail, ".venv/library.py": fail}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    options = {"stdout": stdout, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "script.py", kind], env=environment, **options)


@pytest.mark.parametrize("kind", RUNS)
def test_only_errors_for_people_end_with_one_line(tmp_path, kind):
    process, (code, message) = start(tmp_path, kind), RUNS[kind]
    out, error = process.communicate()
    assert process.returncode == code and (error == message or code == 1 and error.startswith(message))
    assert kind != "text" or out == "\\u220e\n"  # what ASCII cannot show


def test_a_reader_that_has_gone_ends_the_program_quietly(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # as head does
    process = start(tmp_path, "text", stdout=writer)
    assert process.communicate()[1] == "" and process.returncode == 0


def test_a_missing_package_names_the_command_that_installs_it():
    with pytest.raises(ValueError, match="pip install the-package"):
        configurator.need("no_such_module", "the-package")
    assert configurator.need("os.path") is os.path


def test_home_in_a_path(monkeypatch):
    """Which the shell does not replace after an equals sign."""
    monkeypatch.setenv("HOME", "/home/me")
    cfg, _ = configurator.parse(TrainConfig, ["--data_dir=~/data", "--out_dir", "a~/b"])
    assert (cfg.data_dir, cfg.out_dir) == ("/home/me/data", "a~/b")
