"""What did a setting change? A table of runs, and their validation curves.

    python -m extras.ablations out/ablation --baseline=0-sinks --plot

A row is a kind of run, FOLDER/NAME-SEED, with the settings in which it differs from the baseline. Its
numbers are means over seeds ± standard errors (nan for one seed): the validation loss (nats per token) at the
last step that all seeds have, and how much more that is than the baseline's with the same seeds, which saw
the same texts and masks; "-" where data, validation or step are others. Below, means and standard errors of
what extras.sinks --measure wrote beside the logs, at the last step."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from train import MAY_CHANGE, write_file

KINDS = ["sink", "hidden", "end-of-text", "punctuation", "other"]  # of keys
COLORS = dict(zip(KINDS, ["tab:red", "0.5", "tab:green", "tab:blue", "tab:orange"]))
VALIDATION = {"data", "block_size", "eval_seqs", "epochs"}  # settings that its loss depends on


@dataclass
class AblationsConfig:
    folder: str = "out/ablation"  # the runs are FOLDER/NAME-SEED/log.jsonl
    baseline: str | None = None  # the row that others are compared with; None: the first
    plot: bool = False  # draw curves.png, attention.png and rates.png into FOLDER; needs matplotlib


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


def group(runs):
    """{name: (settings, {seed: losses})} of {path: what read_run gives}. Raises ValueError if a name has
    several settings."""
    rows = {}
    for path, (name, seed, settings, losses) in runs.items():
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


def shared_steps(seeds):
    return sorted(set.intersection(*map(set, seeds.values())))  # those that all seeds have


def read_measured(runs):
    """{table: {(name, row): {step: {seed: values}}}} of what extras.sinks --measure wrote beside logs."""
    tables = {}
    for path, (name, seed, *_) in runs.items():
        measured = path.with_name("measured.jsonl")
        for line in measured.read_text().splitlines() if measured.exists() else []:
            values = json.loads(line)
            table, row, step = values.pop("table"), values.pop("row"), values.pop("step", None)
            steps = tables.setdefault(table, {}).setdefault((name, row), {})
            steps.setdefault(step, {})[seed] = values
    return tables


def last_of(steps):
    """The values of each seed at the last step that most seeds have."""
    return list(max(steps.items(), key=lambda item: (len(item[1]), item[0] or 0))[1].values())


def print_tables(tables):
    """Means over seeds ± standard errors, of {table: {(name, row): {step: {seed: values}}}} at the last step.
    A list has a number for each head."""
    for table, rows in tables.items():
        columns = dict.fromkeys(column for steps in rows.values() for column in last_of(steps)[0])
        print(f"\n{table:<28}" + "".join(f"{column:>16}" for column in columns))
        for (name, row), steps in rows.items():
            cells = ""
            for column in columns:
                values, cell = [np.mean(values[column]) for values in last_of(steps) if column in values], "-"
                if values:
                    digits = 3 if max(values) < 100 else 0
                    cell = "{:.{digits}f} ± {:.{digits}f}".format(*mean_and_error(values), digits=digits)
                cells += f"{cell:>16}"
            print(f"{name:<13} {row:<14}{cells}")


def draw_curves(figure, rows, first):
    """Validation losses, and how much more they are than the baseline's with the same seeds."""
    panels = figure.subplots(1, 2)
    for name, (_, seeds) in rows.items():
        steps = shared_steps(seeds)[1:]  # without that of random weights
        losses = np.array([[seeds[seed][step] for step in steps] for seed in seeds])
        before = [[first.get(seed, {}).get(step, np.nan) for step in steps] for seed in seeds]
        for axes, values in zip(panels, (losses, losses - before)):
            mean, error = mean_and_error(values)
            axes.plot(steps, mean, ".-", label=name)
            axes.fill_between(steps, mean - error, mean + error, alpha=0.3)
    panels[0].set(xlabel="step", ylabel="validation loss (nats per token)")
    panels[1].set(xlabel="step", ylabel="more than the baseline with the same seed")
    panels[0].legend()


def of_heads(steps, key):
    """Steps, and an array (steps, seeds * heads)."""
    most = max(map(len, steps.values()))
    steps = {step: seeds for step, seeds in steps.items() if len(seeds) == most}
    return list(steps), [np.ravel([values[key] for values in seeds.values()]) for seeds in steps.values()]


def draw_attention(figure, rows):
    """What each kind of key gets over training: a row for each name, a column for each layer. Solid lines are
    means over heads and seeds, dotted ones the head of any seed that gives the most."""
    names, layers = (list(dict.fromkeys(part)) for part in zip(*rows))
    panels = figure.subplots(len(names), len(layers), sharex=True, sharey=True, squeeze=False)
    for (name, layer), steps in rows.items():
        axes = panels[names.index(name), layers.index(layer)]
        for kind in [kind for kind in COLORS if kind in last_of(steps)[0]]:
            x, heads = of_heads(steps, kind)
            axes.plot(x, np.mean(heads, axis=1), color=COLORS[kind], label=kind)
            axes.plot(x, np.max(heads, axis=1), ":", color=COLORS[kind])
        axes.set_title(f"{name}, {layer}", fontsize="medium")
    panels[0, 0].set_yscale("log")  # and with it all others
    panels[0, 0].set_ylim(bottom=0.3)
    figure.supxlabel("step")
    figure.supylabel("attention (1 is an even share)")
    legends = [axes.get_legend_handles_labels() for axes in panels.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))


def draw_rates(figure, rows):
    """The sink rate of each layer over training: solid the mean over heads and seeds, dotted the highest."""
    names = list(dict.fromkeys(name for name, _ in rows))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for (name, layer), steps in rows.items():
        axes, (x, heads) = panels[names.index(name)], of_heads(steps, "rate")
        (line,) = axes.plot(x, np.mean(heads, axis=1), label=layer)
        axes.plot(x, np.max(heads, axis=1), ":", color=line.get_color())
        axes.set(title=name, xlabel="step")
    panels[0].set_ylabel("sink rate: share of texts in which\none key passes the threshold")
    panels[0].legend()


def main():
    cfg, _ = configurator.parse(AblationsConfig, positional="folder")
    runs = {path: read_run(path) for path in sorted(Path(cfg.folder).glob("*/log.jsonl"))}
    rows = group(runs)
    if not rows:
        raise ValueError(f"there is no {cfg.folder}/*/log.jsonl; train with --out_dir={cfg.folder}/NAME-SEED")
    baseline = cfg.baseline or next(iter(rows))
    if baseline not in rows:
        raise ValueError(f"no run is named {baseline}; wanted one of {', '.join(rows)}")
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure if cfg.plot else None
    width = max(map(len, rows))
    print(f"{'':<{width}}  seeds    step{'validation loss':>18}{f'more than {baseline}':>21}  other settings")
    wanted, first = rows[baseline]
    last = shared_steps(first)[-1]
    for name, (settings, seeds) in rows.items():
        steps = shared_steps(seeds)
        mean, error = mean_and_error([losses[steps[-1]] for losses in seeds.values()])
        other = [k for k in settings | wanted if (settings.get(k) or None) != (wanted.get(k) or None)]
        more = []
        if steps[-1] == last and not set(other) & VALIDATION:
            more = [seeds[seed][last] - first[seed][last] for seed in seeds if seed in first]
        more = "{:.4f} ± {:.4f}".format(*mean_and_error(more)) if more else "-"
        shown = " ".join(f"{key}={settings.get(key)}" for key in other)
        loss = f"{mean:.4f} ± {error:.4f}"
        print(f"{name:<{width}}{len(seeds):>7}{steps[-1]:>8}{loss:>18}{more:>21}  {shown}")

    tables = read_measured(runs)
    print_tables(tables)
    figures = {}
    if cfg.plot:
        figures["curves.png"] = Figure(figsize=(10, 4), layout="constrained")
        draw_curves(figures["curves.png"], rows, first)
    if cfg.plot and "attention" in tables:
        figures["attention.png"] = Figure(figsize=(10, 1.5 + 2 * len(rows)), layout="constrained")
        draw_attention(figures["attention.png"], tables["attention"])
        figures["rates.png"] = Figure(figsize=(10, 3.2), layout="constrained")
        draw_rates(figures["rates.png"], tables["attention"])
    for name, figure in figures.items():
        write_file(f"{cfg.folder}/{name}", figure.savefig)
        print(f"wrote {cfg.folder}/{name}")


if __name__ == "__main__":
    configurator.run(main)
