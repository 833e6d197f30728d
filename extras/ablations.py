"""What did a setting change? A table of runs, and their validation curves.

    python -m extras.ablations out/ablation --baseline=0-sinks --plot

A row is a kind of run, FOLDER/NAME-SEED, with the settings in which it differs from the baseline. Its
numbers are means over seeds ± standard errors (nan for one seed): the validation loss (nats per token) at the
last step that all seeds have, and how much more that is than the baseline's with the same seeds, which saw
the same texts and masks; "-" where data, validation or step are others. Below, means and standard errors of
what extras.sinks --measure wrote beside the logs, at the last step."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from train import MAY_CHANGE, write_file

COLORS = {"sink": "tab:red", "hidden": "0.5", "end-of-text": "tab:green", "punctuation": "tab:blue"}
COLORS["other"] = "0.8"  # of the kinds of keys
VALIDATION = {"data", "block_size", "eval_seqs", "epochs"}  # settings that its loss depends on


@dataclass
class AblationsConfig:
    folder: str = "out/ablation"  # the runs are FOLDER/NAME-SEED/log.jsonl
    baseline: str | None = None  # the row that others are compared with; None: the first
    plot: bool = False  # draw curves.png, attention.png and heads.png into FOLDER; needs matplotlib


def read_run(path):
    """Name, seed, settings, validation losses {step: loss} of a run. Raises ValueError for a foreign log."""
    try:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # the last may be cut off
        losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}  # a step's last row
        starts = [row for row in rows if "config" in row]  # resuming changes nothing but lengths and commit
        first, last = starts[0]["config"], starts[-1]
        settings = {key: first[key] for key in first if key not in ("seed", "out_dir", *MAY_CHANGE)}
        settings |= {key: last["config"].get(key) for key in ("max_steps", "train_flops", "epochs")}
        data = " ".join(sha256[:8] for sha256 in (last["data_sha256"] or {}).values())
        commit = (last["commit"] or "none")[:8] + "-dirty" * str(last["commit"]).endswith("-dirty")
        settings |= {"commit": commit, "data": data}
        return path.parent.name.removesuffix(f"-{first['seed']}"), first["seed"], settings, losses
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no log of train.py ({error!r}); move it") from error


def group(paths):
    """{name: (settings, {seed: losses})}. Raises ValueError if a name has several settings."""
    rows = {}
    for path in paths:
        name, seed, settings, losses = read_run(path)
        if not losses:
            print(f"left out {path}: it has no validation yet")
            continue
        wanted, seeds = rows.setdefault(name, (settings, {}))
        for key in settings | wanted:
            if settings.get(key) != wanted.get(key):
                values = f"{settings.get(key)!r}, not {wanted.get(key)!r}"
                raise ValueError(f"{path} has {key} {values}, as other runs named {name}; rename its folder")
        if seed in seeds:
            raise ValueError(f"{path} is a second run named {name} of seed {seed}; rename its folder")
        seeds[seed] = losses
    return rows


def mean_and_error(values):  # (seeds, ...): over the seeds
    return np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values) - 1 or np.nan)


def read_measured(paths):
    """{table: {(name, row): {step: {seed: values}}}} of what extras.sinks --measure wrote beside logs."""
    tables = {}
    for path in paths:
        (name, seed, *_), measured = read_run(path), path.with_name("measured.jsonl")
        for line in measured.read_text().splitlines() if measured.exists() else []:
            values = json.loads(line)
            table, row, step = values.pop("table"), values.pop("row"), values.pop("step", None)
            steps = tables.setdefault(table, {}).setdefault((name, row), {})
            steps.setdefault(step, {})[seed] = values
    return tables


def print_tables(tables):
    """Means over seeds ± standard errors, of {table: {(name, row): {step: {seed: values}}}} at the last step.
    A list has a number for each head."""
    for table, rows in tables.items():
        last = {key: list(list(steps.values())[-1].values()) for key, steps in rows.items()}
        columns = dict.fromkeys(column for seeds in last.values() for column in seeds[0])
        print(f"\n{table:<28}" + "".join(f"{column:>16}" for column in columns))
        for (name, row), seeds in last.items():
            cells = ""
            for column in columns:
                values = [np.mean(values[column]) for values in seeds if column in values]
                digits = 3 if values and max(values) < 100 else 0
                mean, error = mean_and_error(values) if values else (0, 0)
                cells += f"{f'{mean:.{digits}f} ± {error:.{digits}f}' if values else '-':>16}"
            print(f"{name:<14}{row:<14}{cells}")


def draw_curves(figure, rows, first):
    """Validation losses, and how much more they are than the baseline's with the same seeds."""
    panels = figure.subplots(1, 2)
    for name, (_, seeds) in rows.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))[1:]  # without that of random weights
        losses = np.array([[seeds[seed][step] for step in steps] for seed in seeds])
        before = [[first.get(seed, {}).get(step, np.nan) for step in steps] for seed in seeds]
        for axes, values in zip(panels, (losses, losses - before)):
            mean, error = mean_and_error(values)
            axes.plot(steps, mean, ".-", label=name)
            axes.fill_between(steps, mean - error, mean + error, alpha=0.3)
    panels[0].set(xlabel="step", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="step", ylabel="more than the baseline with the same seed")
    panels[0].legend()


def draw_attention(figure, rows):
    """What each kind of key gets over training: a row for each name, a column for each layer. Thick lines are
    means over heads and seeds; thin ones are the single heads' attention to the sink."""
    names, layers = (list(dict.fromkeys(part)) for part in zip(*rows))
    panels = figure.subplots(len(names), len(layers), sharex=True, sharey=True, squeeze=False)
    for (name, layer), steps in rows.items():
        axes = panels[names.index(name), layers.index(layer)]
        for kind, color in COLORS.items():
            heads = []
            for seeds in steps.values():
                heads.append(np.ravel([values[kind] for values in seeds.values() if kind in values]))
            heads = np.array(heads)  # (steps, seeds * heads)
            if heads.size:
                axes.plot(list(steps), heads.mean(axis=1), color=color, label=kind)
            if kind == "sink":
                axes.plot(list(steps), heads, color=color, linewidth=0.4, alpha=0.6)
        axes.set_title(f"{name}, {layer}", fontsize="medium")
    figure.supxlabel("step")
    panels[0, 0].set_yscale("log")  # and with it all others
    figure.supylabel("attention (1 is an even share)")
    legends = [axes.get_legend_handles_labels() for axes in panels.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))


def sinks_at_the_end(rows):
    """{(name, seed): attention of each head to the sink at the last step, (n_layer, H)}."""
    sinks = {}
    for (name, _), steps in rows.items():
        for seed, values in list(steps.values())[-1].items():
            if "sink" in values:
                sinks.setdefault((name, seed), []).append(values["sink"])
    return sinks


def draw_heads(figure, sinks):
    """A panel for each name and seed."""
    names = list(dict.fromkeys(name for name, _ in sinks))
    columns = math.ceil(len(sinks) / len(names))
    panels = figure.subplots(len(names), columns, sharex=True, sharey=True, squeeze=False)
    for axes, ((name, seed), heads) in zip(panels.flat, sinks.items()):
        image = axes.imshow(heads, vmin=0, vmax=np.max(list(sinks.values())), cmap="magma")
        axes.set_title(f"{name}, seed {seed}", fontsize="medium")
    figure.supxlabel("head")
    figure.supylabel("layer")
    figure.colorbar(image, ax=panels, label="attention to the sink (1 is an even share)")


def main():
    cfg, _ = configurator.parse(AblationsConfig, positional="folder")
    paths = sorted(Path(cfg.folder).glob("*/log.jsonl"))
    rows = group(paths)
    if not rows:
        raise ValueError(f"there is no {cfg.folder}/*/log.jsonl; train with --out_dir={cfg.folder}/NAME-SEED")
    baseline = cfg.baseline or next(iter(rows))
    if baseline not in rows:
        raise ValueError(f"no run is named {baseline}; wanted one of {', '.join(rows)}")
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure if cfg.plot else None
    width = max(map(len, rows))
    print(f"{'':<{width}}  seeds    step{'validation loss':>18}{f'more than {baseline}':>21}  other settings")
    wanted, first = rows[baseline]
    last = max(set.intersection(*map(set, first.values())))
    for name, (settings, seeds) in rows.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))  # that all seeds have
        mean, error = mean_and_error([losses[steps[-1]] for losses in seeds.values()])
        other = [k for k in settings | wanted if (settings.get(k) or None) != (wanted.get(k) or None)]
        more = []
        if steps[-1] == last and not set(other) & VALIDATION:
            more = [seeds[seed][last] - first[seed][last] for seed in seeds if seed in first]
        more = "{:.4f} ± {:.4f}".format(*mean_and_error(more)) if more else "-"
        shown = " ".join(f"{key}={settings.get(key)}" for key in other)
        loss = f"{mean:.4f} ± {error:.4f}"
        print(f"{name:<{width}}{len(seeds):>7}{steps[-1]:>8}{loss:>18}{more:>21}  {shown}")

    tables = read_measured(paths)
    print_tables(tables)
    figures, sinks = {}, sinks_at_the_end(tables.get("attention", {}))
    if cfg.plot:
        figures["curves.png"] = Figure(figsize=(10, 4), layout="constrained")
        draw_curves(figures["curves.png"], rows, first)
    if cfg.plot and "attention" in tables:
        figures["attention.png"] = Figure(figsize=(10, 1.5 + 2 * len(rows)), layout="constrained")
        draw_attention(figures["attention.png"], tables["attention"])
    if sinks and cfg.plot:
        figures["heads.png"] = Figure(figsize=(8, 5), layout="constrained")
        draw_heads(figures["heads.png"], sinks)
    for name, figure in figures.items():
        write_file(f"{cfg.folder}/{name}", figure.savefig)
        print(f"wrote {cfg.folder}/{name}")


if __name__ == "__main__":
    configurator.run(main)
