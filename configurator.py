"""Settings of a script: a dataclass holds the defaults; config files and flags override them, left to right.
A name in a file must be a field, unless it is a module or callable, or starts with an underscore."""

import contextlib
import difflib
import importlib
import inspect
import os
import re
import runpy
import sys
import typing


def parse(config_class, argv=None, positional=None):
    """The command line as a config_class, and {key: where it was set}. positional: the key of a bare word."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class))
        sys.exit(0)
    hints, values, set_by, args = typing.get_type_hints(config_class), {}, {}, iter(argv)
    for arg in args:
        settings, source = {positional or arg: arg}, "command line"
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if not equals:  # --show is --show=True, and --steps 5 is --steps=5
                value = "True" if hints.get(key) is bool else next(args, "--")
                if value.startswith("--") and key in hints:
                    raise ValueError(f"{arg} has no value; wanted --{key}=VALUE")
            settings = {key: value}
        elif arg.endswith(".py"):
            try:
                names, source = runpy.run_path(arg), arg
            except Exception as error:  # whatever a Python file can do wrong
                raise ValueError(f"config file {arg}: {type(error).__name__}: {error}") from error
            names = {k: v for k, v in names.items() if not k.startswith("_") and not callable(v)}
            settings = {k: v for k, v in names.items() if not inspect.ismodule(v)}
        for key, value in settings.items():
            values[key], set_by[key] = convert(config_class, key, value, source), source
    return config_class(**values), set_by


def convert(config_class, key, value, source):
    """value, text from a flag or an object from a file, as the type of the field: 1 -> 1.0, 1e5 -> 100000."""
    hints, text = typing.get_type_hints(config_class), str(value)
    if key not in hints:
        near = {"lr": "learning_rate", "iters": "max_steps", "max_iters": "max_steps"}.get(key)
        near = near if near in hints else difflib.get_close_matches(key, hints, n=1, cutoff=0)[0]
        raise ValueError(f"unknown key {key!r} ({source}); did you mean --{near}=...? --help lists the keys")
    kinds = typing.get_args(hints[key]) or (hints[key],)
    literals = {"None": None, "True": True, "False": False, "true": True, "false": False}
    if text in literals and type(literals[text]) in kinds:
        return literals[text]
    if str in kinds and isinstance(value, str):
        return os.path.expanduser(value) if key not in ("prompt", "question") else value
    with contextlib.suppress(ValueError):
        if float in kinds:
            return float(text)
        if int in kinds and float(text).is_integer() and abs(float(text)) < 2**63:
            return int(text) if text.lstrip("+-").isdigit() else int(float(text))
    raise ValueError(f"{key}={value!r} ({source}): wanted {inspect.formatannotation(hints[key])}")


def help_text(config_class):
    """The script's docstring and its keys, with types, defaults and comments as they stand in the source."""
    source = "".join(inspect.getsource(cls) for cls in reversed(config_class.__mro__[:-1]))
    lines = {key: line for line, key in re.findall(r"^    ((\w+): .* = .*)", source, re.MULTILINE)}
    return "\n  --".join([f"{sys.modules[config_class.__module__].__doc__}\n\nKeys:", *lines.values()])


def describe(cfg, set_by):
    """A line for each key that was set and differs from its default."""
    lines = ["settings that differ from the defaults:"]
    for key, source in set_by.items():
        value, default = getattr(cfg, key), getattr(type(cfg), key)
        if value != default:
            lines.append(f"  {key} = {value!r}  (default {default!r}, set by {source})")
    return "\n".join(lines) if len(lines) > 1 else "settings: all defaults"


def need(package, install=None):
    """The package, for parts that not everybody uses. Raises ValueError with the install command."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{error}; run: pip install {install or package}") from error


def run(main):
    """Runs main. A ValueError that our files raise, or an OSError, ends with one line and exit code 2."""
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to stop
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # python sample.py | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        root, file = os.path.dirname(os.path.abspath(__file__)), inspect.trace()[-1].filename
        ours = ("", "extras", "docs/results", "assets")
        if isinstance(error, ValueError) and os.path.dirname(os.path.relpath(file, root)) not in ours:
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")  # in one piece, beside other processes
        sys.exit(2)
