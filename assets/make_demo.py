"""Makes assets/demo again, from the README's two models and the problems held out from them.

    python prepare_data.py && python train.py && python train.py --n_sink=0 --out_dir=out/arithmetic-vanilla
    python -m assets.make_demo
It keeps their weights, without the state of the optimizer."""

import json
import os

import numpy as np
import torch

from model import load_checkpoint
from prepare_data import file_sha256, load_meta
from train import write_file

RUNS = {"sink": "out/arithmetic", "vanilla": "out/arithmetic-vanilla"}
KEPT = ("model", "model_config", "run_config", "step", "best_val_loss", "meta")


def main():
    data, demo = "data/arithmetic", "assets/demo"
    meta = load_meta(data)
    os.makedirs(f"{demo}/arithmetic", exist_ok=True)
    for split, n in (("train", 10), ("val", 1000)):  # no more of the training data than a data set needs
        cuts = np.load(f"{data}/{split}_cuts.npy")[:n]
        tokens = np.fromfile(f"{data}/{split}.bin", meta["dtype"])[: cuts[-1, -1]]
        meta["tokens"][split] = len(tokens)
        tokens.tofile(f"{demo}/arithmetic/{split}.bin")
        np.save(f"{demo}/arithmetic/{split}_cuts.npy", cuts)
        for name in (f"{split}.bin", f"{split}_cuts.npy"):
            meta["sha256"][name.split(".")[0]] = file_sha256(f"{demo}/arithmetic/{name}")
    with open(f"{demo}/arithmetic/meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
    for name, run in RUNS.items():
        checkpoint = load_checkpoint(run)
        kept = {key: checkpoint[key] for key in KEPT}
        kept["run_config"] |= {"data_dir": demo}  # where eval.py and extras.sinks look
        os.makedirs(f"{demo}/{name}", exist_ok=True)
        write_file(f"{demo}/{name}/ckpt.pt", lambda file, kept=kept: torch.save(kept, file))
        print(f"{demo}/{name}: step {kept['step']}, validation loss {kept['best_val_loss']:.4f}")


if __name__ == "__main__":
    main()
