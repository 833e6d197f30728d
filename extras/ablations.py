"""What did a setting change? A table of runs, and their validation curves.

    python -m extras.ablations out/ablation --baseline=0-sinks --plot

A row is a kind of run, FOLDER/NAME-SEED, with the settings in which it differs from the baseline. Its
numbers are means over seeds ± standard errors (nan for one seed): the validation loss (nats per token) at the
last step that all seeds have, and how much more that is than the baseline's with the same seeds, which saw
the same texts and masks; "-" where data, validation or step are others."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from train import MAY_CHANGE, write_file

VALIDATION = {"data", "block_size", "eval_seqs", "epochs"}  # settings that its loss depends on


@dataclass
class AblationsConfig:
    folder: str = "out/ablation"  # the runs are FOLDER/NAME-SEED/log.jsonl
    baseline: str | None = None  # the row that others are compared with; None: the first
    plot: bool = False  # draw the validation losses into FOLDER/curves.png; needs matplotlib


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


def main():
    cfg, _ = configurator.parse(AblationsConfig, positional="folder")
    rows = group(sorted(Path(cfg.folder).glob("*/log.jsonl")))
    if not rows:
        raise ValueError(f"there is no {cfg.folder}/*/log.jsonl; train with --out_dir={cfg.folder}/NAME-SEED")
    baseline = cfg.baseline or next(iter(rows))
    if baseline not in rows:
        raise ValueError(f"no run is named {baseline}; wanted one of {', '.join(rows)}")
    axes = configurator.need("matplotlib.figure", "matplotlib").Figure().subplots() if cfg.plot else None
    width = max(map(len, rows))
    print(f"{'':<{width}}  seeds    step{'validation loss':>18}{f'more than {baseline}':>21}  other settings")
    wanted, first = rows[baseline]
    last = max(set.intersection(*map(set, first.values())))
    for name, (settings, seeds) in rows.items():
        steps = sorted(set.intersection(*map(set, seeds.values())))  # that all seeds have
        mean, error = mean_and_error([[losses[step] for step in steps] for losses in seeds.values()])
        other = [k for k in settings | wanted if (settings.get(k) or None) != (wanted.get(k) or None)]
        more = []
        if steps[-1] == last and not set(other) & VALIDATION:
            more = [seeds[seed][last] - first[seed][last] for seed in seeds if seed in first]
        more = "{:.4f} ± {:.4f}".format(*mean_and_error(more)) if more else "-"
        shown = " ".join(f"{key}={settings.get(key)}" for key in other)
        loss = f"{mean[-1]:.4f} ± {error[-1]:.4f}"
        print(f"{name:<{width}}{len(seeds):>7}{steps[-1]:>8}{loss:>18}{more:>21}  {shown}")
        if axes:
            axes.plot(steps[1:], mean[1:], ".-", label=name)  # without the first, the loss of random weights
            axes.fill_between(steps[1:], (mean - error)[1:], (mean + error)[1:], alpha=0.3)
    if axes:
        axes.set(xlabel="step", ylabel="validation loss (nats per token)")
        axes.legend()
        write_file(f"{cfg.folder}/curves.png", axes.figure.savefig)
        print(f"wrote {cfg.folder}/curves.png")


if __name__ == "__main__":
    configurator.run(main)
