"""Settings of a script: one dataclass holds the defaults, files and flags override them, left to right.

    python train.py config/shakespeare.py --learning_rate=1e-3 --out_dir=out/try

The comment behind a field is its --help text. A config file is plain Python assignments, run in a namespace of its own; a name
in it that is no field is an error, unless it begins with an underscore or is a function, a class or a module.
"""

import dataclasses
import difflib
import inspect
import numbers
import os
import re
import runpy
import sys
import traceback
import types
import typing


def parse(config_class, argv=None, positional=None):
    """The command line (default: sys.argv[1:]) as an instance of config_class, and where each key was set: {key: place}.

    positional names the field that takes a word without dashes that is no .py file. Prints nothing, except for --help, after
    which it exits. Raises ValueError for an unknown key, a value of the wrong type, a missing file."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(config_class, positional))
        raise SystemExit(0)
    values, set_by = {}, {}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")  # only the first '=': a value may contain more of them
            check_key(config_class, key, "command line")
            if not equals:
                raise ValueError(f"{arg}: wanted --{key}=value")
            values[key], set_by[key] = convert(config_class, key, text, "command line"), "command line"
        elif arg.endswith(".py"):
            if not os.path.isfile(arg):
                raise ValueError(f"config file {arg} not found")
            try:
                settings = runpy.run_path(arg)
            except (Exception, SystemExit) as error:  # whatever a Python file can do wrong
                raise ValueError(f"config file {arg}: {type(error).__name__}: {error}") from error
            for key, value in settings.items():
                if key.startswith("_") or callable(value) or isinstance(value, types.ModuleType):
                    continue
                check_key(config_class, key, arg)
                values[key], set_by[key] = convert(config_class, key, value, arg), arg
        elif positional:
            values[positional], set_by[positional] = arg, "command line"
        else:
            raise ValueError(f"{arg}: wanted a config file (x.py) or --key=value; --help lists the keys")
    return config_class(**values), set_by


def check_key(config_class, key, place):
    names = [field.name for field in dataclasses.fields(config_class)]
    if key not in names:
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
        raise ValueError(f"unknown key {key!r} ({place}); {hint}")


def convert(config_class, key, value, place):
    """value, as text from a flag or as it stands in a file, as the type of the field: 1 -> 1.0, 1e5 -> 100000, 'None' -> None."""
    kind = typing.get_type_hints(config_class)[key]
    kinds = typing.get_args(kind) or (kind,)
    if type(None) in kinds and (value is None or isinstance(value, str) and value == "None"):
        return None
    if str in kinds and isinstance(value, str) and "\0" not in value:
        return value
    if bool in kinds:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif isinstance(value, (str, numbers.Real)) and not isinstance(value, bool):
        try:
            number = float(value)
            if float in kinds:
                return number
            if int in kinds and number.is_integer() and abs(number) < 2**63:
                # from the text where it is one: that keeps every digit of a long integer, where float() rounds
                return int(value) if re.fullmatch(r"[+-]?\d+", str(value)) else int(number)
        except (ValueError, OverflowError):
            pass
    wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
    raise ValueError(f"{key}={value!r} ({place}): wanted {wanted}")


def help_text(config_class, positional=None):
    """Keys, defaults and the comments behind the fields, base classes first."""
    comments = {}
    for cls in reversed(config_class.__mro__[:-1]):
        for line in inspect.getsource(cls).splitlines():
            match = re.match(r"\s+(\w+)\s*:.*?=.*?#\s*(.*)", line)
            if match:
                comments[match[1]] = match[2]
    doc = inspect.getdoc(sys.modules[config_class.__module__]) or ""
    usage = f"python {os.path.basename(sys.argv[0])} {f'[{positional}] ' if positional else ''}[config/x.py ...] [--key=value ...]"
    rows = [
        f"  --{f.name}={f.default}".ljust(38) + f"  {comments.get(f.name, '')}"
        for f in dataclasses.fields(config_class)
    ]
    return "\n".join([doc, "", "usage: " + usage, "Later settings win. Keys, with their defaults:", *rows])


def describe(cfg, set_by):
    """One line for each key that was set to something else than its default: value, default, where it was set."""
    changed = [
        field
        for field in dataclasses.fields(cfg)
        if field.name in set_by and getattr(cfg, field.name) != field.default
    ]
    lines = [
        f"  {f.name} = {getattr(cfg, f.name)!r}  (default {f.default!r}, set by {set_by[f.name]})"
        for f in changed
    ]
    return (
        "\n".join(["settings that differ from the defaults:", *lines]) if lines else "settings: all defaults"
    )


def run(main):
    """Runs a script's main. What a user can mend ends with one line and exit code 2: a ValueError that one of our own lines
    raises, an error of the file system, too little memory. Ctrl-C ends with 130. Anything else keeps its traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show is no reason to end
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = os.path.dirname(os.path.abspath(last.filename)) == os.path.dirname(os.path.abspath(__file__))
        no_memory = isinstance(error, MemoryError) or re.search(
            "allocate|out of memory|overflow|too big", str(error)
        )
        if (
            isinstance(error, ValueError)
            and ours
            and last.line.startswith("raise ")
            or isinstance(error, OSError)
        ):
            what = error
        elif no_memory:
            what = f"not enough memory for that; lower the sizes or numbers that were set ({str(error)[:200] or 'MemoryError'})"
        else:
            raise
        print(
            "error:", " ".join(str(what).split()), file=sys.stderr
        )  # one line, whatever names and values hold
        raise SystemExit(2) from None
