"""Settings of a script: a dataclass holds the defaults, config files and flags override them, left to right.

    python train.py config/shakespeare.py --learning_rate=1e-3 --out_dir=out/try

The comment behind a field is its --help text. A config file is plain Python assignments; a name in it that is
no field is an error, unless it starts with an underscore or is a module or callable."""

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
import traceback
import types
import typing


def parse(config_class, argv=None, positional=None):
    """The command line (default: sys.argv[1:]) as an instance of config_class, and {key: where it was set}.
    positional names the field that takes a bare word. Raises ValueError for what does not fit."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class))
        sys.exit(0)
    values, set_by = {}, {}
    for arg in argv:
        settings, source = {}, "command line"
        if arg.startswith("--") and "=" in arg:
            key, _, settings[key] = arg[2:].partition("=")  # at the first '=': a value may contain more
        elif arg.endswith(".py"):
            settings, source = read_config(arg), arg
        elif positional and not arg.startswith("-"):
            settings[positional] = arg
        else:
            raise ValueError(f"{arg}: wanted --key=value or a config file (x.py); --help lists the keys")
        for key, value in settings.items():
            values[key], set_by[key] = convert(config_class, key, value, source), source
    return config_class(**values), set_by


def read_config(path):
    """The assignments of a config file, {name: value}."""
    try:
        settings = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # whatever a Python file can do wrong
        raise ValueError(f"config file {path}: {type(error).__name__}: {error}") from error
    hidden = [k for k, v in settings.items() if k[0] == "_" or callable(v) or isinstance(v, types.ModuleType)]
    return {key: value for key, value in settings.items() if key not in hidden}


def convert(config_class, key, value, source):
    """value, text from a flag or an object from a file, as the type of the field: 1 -> 1.0, 1e5 -> 100000."""
    hints, text = typing.get_type_hints(config_class), str(value)
    if key not in hints:
        near = difflib.get_close_matches(key, hints, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        raise ValueError(f"unknown key {key!r} ({source}); {hint}")
    kinds = typing.get_args(hints[key]) or (hints[key],)
    if type(None) in kinds and text == "None":
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if str in kinds and isinstance(value, str) and "\0" not in value:
        return value
    try:
        number = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        if float in kinds:
            return float(number)
        if int in kinds and number == int(number) and abs(number) < 2**63:
            return int(number)
    except (ValueError, OverflowError):
        pass
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise ValueError(f"{key}={value!r} ({source}): wanted {wanted}")


def help_text(config_class):
    """The script's docstring, then its keys with their defaults and the comments behind them."""
    source = "".join(inspect.getsource(cls) for cls in reversed(config_class.__mro__[:-1]))
    comments = dict(re.findall(r"^ +(\w+)\s*:.*?=.*?# *(.*)", source, re.MULTILINE))
    lines = [inspect.getdoc(sys.modules[config_class.__module__]) or "", "", "Later settings win. Keys:"]
    for field in dataclasses.fields(config_class):
        lines.append(f"  --{field.name}={field.default}".ljust(38) + "  " + comments.get(field.name, ""))
    return "\n".join(lines)


def describe(cfg, set_by):
    """A line for each key that differs from its default: value, default, where it was set."""
    lines = []
    for field in dataclasses.fields(cfg):
        name, value, default = field.name, getattr(cfg, field.name), field.default
        if name in set_by and value != default:
            lines.append(f"\n  {name} = {value!r}  (default {default!r}, set by {set_by[name]})")
    return "settings that differ from the defaults:" + ("".join(lines) or " none")


def need(package, install=None):
    """The package, for parts that not everybody uses. Raises ValueError with the install command."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{error}; run: pip install {install or package}") from error


def run(main):
    """Runs a script's main. A ValueError that our own files raise and an error of the file system end with one
    line and exit code 2, Ctrl-C with 130. Anything else keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # python sample.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        folder = os.path.dirname(os.path.abspath(traceback.extract_tb(error.__traceback__)[-1].filename))
        root = os.path.dirname(os.path.abspath(__file__))
        if isinstance(error, ValueError) and folder not in (root, os.path.join(root, "extras")):
            raise
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
