"""What did a setting change? Run: python -m extras.ablations out/ablation --curves=curves.png

A row is a kind of run in FOLDER/*/log.jsonl, named by the settings in which runs differ, seeds aside. Its
numbers are means over seeds ± standard errors (nan for one seed): the last validation loss (nats per token),
and how much more it is than in the first row's runs of the same seeds, which saw the same texts and masks.

    python -m extras.ablations anchor config/ablation.py --n_sink=0 --out_dir=out/ablation/anchor

trains like train.py, but the first token of a text is never hidden. On the built-in problems this is the
end-of-text in front of each: an anchor that is always there, at a fixed place, and is no sink."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
from train import MAY_CHANGE, TrainConfig, start_run, token_batches, train, write_file


@dataclass
class AblationsConfig:
    folder: str = "out/ablation"  # the runs are FOLDER/*/log.jsonl
    curves: str | None = None  # draw the validation losses into this .png file; needs matplotlib


def read_run(path):
    """Path, seed, settings, validation losses {step: loss} of a run. Raises ValueError for a foreign log."""
    try:
        rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]]  # the last may be cut off
        losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}  # a step's last row
        starts = [row for row in rows if "config" in row]  # resuming changes nothing but lengths and commit
        first, last = starts[0]["config"], starts[-1]
        settings = {key: first[key] for key in first if key not in ("seed", "out_dir", *MAY_CHANGE)}
        settings |= {key: last["config"].get(key) for key in ("max_steps", "train_flops", "epochs")}
        data = " ".join(sha256[:8] for sha256 in (last["data_sha256"] or {}).values())
        settings |= {"last step": max(losses), "commit": last["commit"], "data": data}
        return path, first["seed"], settings, losses
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is no log of train.py with a validation ({error!r}); move it") from error


def group(runs):
    """{settings in which the runs differ, as text: {seed: losses}}, in the order of the runs."""
    union, kinds = {key: value for _, _, settings, _ in runs for key, value in settings.items()}, {}
    keys = [key for key in union if any(settings.get(key) != union[key] for _, _, settings, _ in runs)]
    for path, seed, settings, losses in runs:
        kind = kinds.setdefault(", ".join(f"{key}={settings.get(key)}" for key in keys) or "all runs", {})
        if seed in kind:
            raise ValueError(f"{path} is a second run of seed {seed} with the same settings; move one away")
        kind[seed] = losses
    return kinds


def mean_and_error(values):  # (seeds, ...): over the seeds
    return np.mean(values, axis=0), np.std(values, axis=0) / np.sqrt(len(values) - 1 or np.nan)


@dataclass
class AnchorConfig(TrainConfig):
    anchor: bool = True  # the first token of a text is never hidden


def train_anchored(argv):
    cfg, set_by = configurator.parse(AnchorConfig, argv)
    cfg, meta, model, resume = start_run(cfg, set_by)
    get_batch = token_batches(os.path.join(cfg.data_dir, cfg.dataset), meta, cfg)

    def anchored(split, index):
        x0, maskable = get_batch(split, index)
        maskable[:, 0] = not cfg.anchor
        return x0, maskable

    train(cfg, model, anchored, meta, resume)


def main():
    if sys.argv[1:2] == ["anchor"]:
        return train_anchored(sys.argv[2:])
    cfg, _ = configurator.parse(AblationsConfig, positional="folder")
    runs = [read_run(path) for path in sorted(Path(cfg.folder).glob("*/log.jsonl"))]
    if not runs:
        raise ValueError(f"there is no {cfg.folder}/*/log.jsonl; train with --out_dir={cfg.folder}/NAME")
    axes = configurator.need("matplotlib.figure", "matplotlib").Figure().subplots() if cfg.curves else None
    print(f"seeds{'validation loss':>18}{'more than first':>19}  settings")
    first = {}
    for name, kind in group(runs).items():
        steps = sorted(set.intersection(*map(set, kind.values())))  # that all seeds have
        mean, error = mean_and_error([[losses[step] for step in steps] for losses in kind.values()])
        last = {seed: losses[steps[-1]] for seed, losses in kind.items()}
        first = first or last
        more, se = mean_and_error([last[seed] - first[seed] for seed in last if seed in first] or [np.nan])
        print(f"{len(kind):>5}{mean[-1]:>9.4f} ± {error[-1]:<6.4f}{more:>10.4f} ± {se:<6.4f}  {name}")
        if axes:
            axes.plot(steps[1:], mean[1:], ".-", label=name)  # without the first, the loss of random weights
            axes.fill_between(steps[1:], (mean - error)[1:], (mean + error)[1:], alpha=0.3)
    if axes:
        axes.set(xlabel="step", ylabel="validation loss (nats per token)")
        axes.legend(fontsize="x-small")
        write_file(cfg.curves, axes.figure.savefig)


if __name__ == "__main__":
    configurator.run(main)
