"""A control: trains like train.py, but the first token of a text is never hidden.

    python -m docs.results.anchor config/ablation.py --n_sink=0 --seed=1 --out_dir=out/anchor/vanilla-1

On the built-in problems that token is the end-of-text in front of each: an anchor, which is always there, at
a fixed position, and which is no sink. The loss is that of the other tokens."""

import os
from dataclasses import dataclass

import configurator
from train import TrainConfig, start_run, token_batches, train


@dataclass
class AnchorConfig(TrainConfig):
    anchor: bool = True  # the first token of a text is never hidden


def keep_first_visible(get_batch):
    def get_anchored(split, index):
        x0, maskable = get_batch(split, index)
        maskable[:, 0] = False
        return x0, maskable

    return get_anchored


def main():
    cfg, set_by = configurator.parse(AnchorConfig)
    cfg, meta, model, resume = start_run(cfg, set_by)
    get_batch = token_batches(os.path.join(cfg.data_dir, cfg.dataset), meta, cfg)
    train(cfg, model, keep_first_visible(get_batch) if cfg.anchor else get_batch, meta, resume)


if __name__ == "__main__":
    configurator.run(main)
