"""What did a setting change? A table of runs, and their validation curves.

    python -m extras.ablations out/ablation --baseline=0-sinks --plot

A row is a kind of run, FOLDER/NAME-SEED, with the settings in which it differs from the baseline. Its
numbers are means over seeds ± standard errors (nan for one seed): the validation loss (nats per token) at the
last step that all seeds have, and how much more that is than the baseline's with the same seeds, which saw
the same texts and masks, with its 95 % interval; "-" where a setting differs that may decide texts, masks or
validation."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from train import MAY_CHANGE, MODEL_KEYS, write_file

# Settings that decide neither texts nor masks: runs that differ in others, or in unknown ones, are not paired
OF_AN_ARM = {"dataset", "preset", "init_from", "commit", "dtype", "max_steps", "train_flops", "learning_rate"}
OF_AN_ARM |= {"min_lr", "warmup", "weight_decay", "beta1", "beta2", "grad_clip", *MODEL_KEYS} - {"block_size"}
# Student's t: how many standard errors a 95 % interval of n seeds has on each side, by n
T95 = [np.nan, np.nan, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


@dataclass
class AblationsConfig:
    folder: str = "out/ablation"  # the runs are FOLDER/NAME-SEED/log.jsonl
    baseline: str | None = None  # the row that others are compared with; None: the first
    plot: bool = False  # draw curves.png into FOLDER; needs matplotlib


def read_run(path):
    """Name, seed, settings, validation losses {step: loss} of a run."""
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]  # the last may be cut off
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}  # a step's last row
    starts = [row for row in rows if "config" in row]  # resuming changes nothing but lengths and commit
    first, last = starts[0]["config"], starts[-1]
    settings = {key: first[key] for key in first if key not in ("seed", "out_dir", *MAY_CHANGE)}
    settings |= {key: last["config"].get(key, "-") for key in ("max_steps", "train_flops", "epochs")}
    commit = last["commit"] or "none"
    settings["commit"] = commit.removesuffix("-dirty")[:8] + "-dirty" * commit.endswith("-dirty")
    settings["data"] = " ".join(sha256[:8] for sha256 in (last["data_sha256"] or {}).values())
    start = str(first["init_from"])  # each seed may have one of its own
    settings["init_from"] = re.sub(r"-\d+$", "", start)
    return path.parent.name.removesuffix(f"-{first['seed']}"), first["seed"], settings, losses


def differing(settings, others):
    """The keys in which they differ. A setting that an older log lacks counts as off."""
    return [key for key in settings | others if (settings.get(key) or None) != (others.get(key) or None)]


def group(runs):
    """{name: (settings, {seed: losses})} of {path: what read_run gives}. Raises ValueError if runs of one
    name do not go together."""
    rows = {}
    for path, (name, seed, settings, losses) in runs.items():
        if not losses:
            print(f"left out {path}: it has no validation yet")
            continue
        others, seeds = rows.setdefault(name, (settings, {}))
        if keys := differing(settings, others):
            raise ValueError(f"{path} has another {', '.join(keys)} than others named {name}; rename it")
        if seed in seeds:
            raise ValueError(f"{path} is a second run named {name} of seed {seed}; rename it")
        seeds[seed] = losses
    return rows


def mean_and_error(values):  # (seeds, ...): over the seeds
    return np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values) - 1 or np.nan)


def compare(values, first):
    """How much more values {seed: number} are than first with the same seeds: mean ± standard error, and its
    95 % interval, as texts."""
    differences = [values[seed] - first[seed] for seed in values if seed in first]
    if not differences:
        return "-", "-"
    (center, se), t = mean_and_error(differences), T95[min(len(differences), 10)]
    interval = f"{center - t * se:.3f} to {center + t * se:.3f}" if se > 0 else "-"
    return f"{center:.4f} ± {se:.4f}", interval


def shared_steps(seeds):
    return sorted(set.intersection(*map(set, seeds.values())))  # those that all seeds have


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


def print_table(rows, baseline):
    """A row for each name."""
    width = max(map(len, rows))
    head = f"{'validation loss':>18}{f'more than {baseline}':>23}{'95 % interval':>20}"
    print(f"{'':<{width}}  seeds    step{head}  other settings")
    wanted, first = rows[baseline]
    last = shared_steps(first)[-1]
    for name, (settings, seeds) in rows.items():
        step, other = shared_steps(seeds)[-1], differing(settings, wanted)
        mean, error = mean_and_error([losses[step] for losses in seeds.values()])
        more, interval = "-", "-"
        if step == last and OF_AN_ARM.issuperset(other):
            at_last = {seed: losses[last] for seed, losses in seeds.items()}
            more, interval = compare(at_last, {seed: losses[last] for seed, losses in first.items()})
        loss, shown = f"{mean:.4f} ± {error:.4f}", " ".join(f"{key}={settings.get(key)}" for key in other)
        row = f"{len(seeds):>7}{step:>8}{loss:>18}{more:>23}{interval:>20}  {shown}"
        print(f"{name:<{width}}{row}")


def main():
    cfg, _ = configurator.parse(AblationsConfig, positional="folder")
    rows = group({path: read_run(path) for path in sorted(Path(cfg.folder).glob("*/log.jsonl"))})
    if not rows:
        raise ValueError(f"there is no {cfg.folder}/*/log.jsonl; train with --out_dir={cfg.folder}/NAME-SEED")
    baseline = cfg.baseline or next(iter(rows))
    if baseline not in rows:
        raise ValueError(f"no run is named {baseline}; wanted one of {', '.join(rows)}")
    Figure = configurator.need("matplotlib.figure", "matplotlib").Figure if cfg.plot else None
    print_table(rows, baseline)
    if cfg.plot:
        figure = Figure(figsize=(10, 4), layout="constrained")
        draw_curves(figure, rows, rows[baseline][1])
        write_file(f"{cfg.folder}/curves.png", figure.savefig)
        print(f"wrote {cfg.folder}/curves.png")


if __name__ == "__main__":
    configurator.run(main)
