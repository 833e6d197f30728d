"""Speed and memory of several ways to do the same, which take turns in one run.

    python -m extras.bench sink                                 # a step: vanilla, sink as mask or split, gate
    python -m extras.bench train --compile=True                 # a step: head everywhere, or where hidden
    python -m extras.bench sample --out_dir=out/sft-arithmetic  # decoding rules on the test problems
    python -m extras.bench sink --preset=34M --block_size=2048 --batch_size=8 --dtype=bfloat16 --compile=True

A step is a forward and a backward pass, without the optimizer. All ways have the same weights, texts and
masks: those that compute the same show the same loss, in nats per token. Seconds are medians over rounds.
A ratio is the median of the ratios to the first way in the same round, with about its standard error.
GPU MB is the most that a step allocates beyond what was there before it, such as weights."""

import functools
import math
import os
import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import configurator
from eval import EvalConfig, answer_problems, read_problems
from model import MDM, MDMConfig, mask_tokens, weighted_nll
from sample import load_trained
from train import autocast, flops_utilization, setup_distributed


@dataclass
class BenchConfig:
    part: str = "sink"  # what to measure: sink, train or sample
    rounds: int = 20  # how often each way is timed; sample: how many batches of problems, at most
    batch_size: int | None = None  # sequences of a step, or problems at once; None: 2, or 64 problems
    preset: str = "6M"  # sink, train: size of the model, which has random weights
    vocab_size: int = 32000  # sink, train: its tokens
    block_size: int = 512  # sink, train: tokens of a sequence
    compile: bool = False  # sink, train: each way also with torch.compile
    out_dir: str = "out/sft-arithmetic"  # sample: the model's checkpoint, its folder or the file
    data: str | None = None  # sample: file or URL of problems; None: those of the training data
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16

    def __post_init__(self):
        if self.part not in ("sink", "train", "sample"):
            raise ValueError(f"cannot measure {self.part!r}; wanted sink, train or sample")
        if self.batch_size is None:
            self.batch_size = 64 if self.part == "sample" else 2


def take_turns(ways, rounds, device):
    """Calls way(0), way(1), ... of all ways in turns, after a call of each to warm up. Returns results,
    seconds and, on a GPU, the bytes allocated at the peak of a call: {name: [one for each round]}."""
    results, seconds, memory = ({name: [] for name in ways} for _ in range(3))
    for way in ways.values():
        way(0)
    for number in tqdm(range(rounds), unit="round", leave=False, disable=None):
        for name, way in ways.items():
            if device.type == "cuda":
                in_use = torch.cuda.memory_allocated(device)
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            results[name].append(way(number))  # a result on the CPU: the GPU is done
            seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda":
                memory[name].append(torch.cuda.max_memory_allocated(device) - in_use)
    return results, seconds, memory


def ratio(seconds, first):
    """Median over rounds of seconds / first, and about its standard error: 1.25 times that of a mean, with
    the standard deviation of a normal distribution, 1.48 times the median absolute deviation."""
    ratios = np.array(seconds) / np.array(first)
    deviation = np.median(abs(ratios - np.median(ratios))) if len(ratios) > 1 else np.nan
    return np.median(ratios), 1.25 * 1.48 * deviation / math.sqrt(len(ratios))


def make_batch(cfg, everywhere):
    """x0, xt, masked (B, T), p_mask: always the same, half of the tokens hidden. everywhere: the same loss,
    written so that it needs logits at all positions."""
    generator, shape = torch.Generator().manual_seed(0), (cfg.batch_size, cfg.block_size)
    x0 = torch.randint(cfg.vocab_size, shape, generator=generator)
    p_mask = (torch.arange(cfg.batch_size)[:, None] + 0.5) / cfg.batch_size  # evenly spread, one a row
    noise, maskable = torch.rand(shape, generator=generator), torch.ones(shape, dtype=torch.bool)
    xt, masked = mask_tokens(x0, p_mask, maskable, cfg.vocab_size, noise)
    if everywhere:  # a token that is not hidden weighs 1 / infinity
        return x0, xt, maskable, torch.where(masked, p_mask, math.inf)
    return x0, xt, masked, p_mask


def make_step(cfg, device, compiled=False, everywhere=False, **flags):
    """A model with these flags, and step(number): a forward and a backward pass, which returns the loss."""
    sizes = {"vocab_size": cfg.vocab_size, "block_size": cfg.block_size}
    model, batch = MDM(MDMConfig.preset(cfg.preset, **sizes, **flags)).to(device), make_batch(cfg, everywhere)
    if compiled:
        model.trunk = torch.compile(model.trunk)

    def step(number):
        with autocast(device, cfg.dtype):
            loss = weighted_nll(model, *batch).sum() / batch[0].numel()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.item()

    return model, step


def bench_steps(cfg, device):
    """Prints a row for each way to make a training step, {name: options of make_step}."""
    ways = {"head everywhere": {"everywhere": True}, "head where hidden": {}}
    if cfg.part == "sink":
        ways = {
            "vanilla": {"n_sink": 0},
            "sink, mask": {"sink_attention": "mask"},
            "sink, split": {"sink_attention": "split"},
            "gate": {"n_sink": 0, "gated_attention": True},
        }
    models, steps = {}, {}
    for compiled in (False, True) if cfg.compile else (False,):
        for name, options in ways.items():
            name += ", compiled" if compiled else ""
            models[name], steps[name] = make_step(cfg, device, compiled, **options)
    losses, seconds, memory = take_turns(steps, cfg.rounds, device)
    first = next(iter(ways))
    print(f"{cfg.preset}, vocabulary {cfg.vocab_size:,}, {cfg.batch_size} x {cfg.block_size} tokens a step")
    print(f"{'':<28}{'ms':>9}{'time':>18}{'tokens/s':>11}{'MFU':>7}{'GPU MB':>8}{'loss':>10}")
    for name, model in models.items():
        median, (times, error) = np.median(seconds[name]), ratio(seconds[name], seconds[first])
        speed = cfg.batch_size * cfg.block_size / median
        mfu = flops_utilization(model, cfg.block_size, speed)
        mfu, peak = f"{mfu:.1%}" if mfu else "-", f"{max(memory[name]) / 1e6:,.0f}" if memory[name] else "-"
        row = f"{name:<28}{1e3 * median:>9.1f}{f'{times:.3f} ± {error:.3f}x':>18}{speed:>11,.0f}"
        print(f"{row}{mfu:>7}{peak:>8}{losses[name][-1]:>10.5f}")


def bench_sample(cfg, device):
    """Prints a row for each decoding rule. Passes are those of a problem, thoughts and answer together."""
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, device)
    run, block_size = checkpoint["run_config"], model.config.block_size
    folder = os.path.join(run["data_dir"], run["dataset"])
    problems = read_problems(cfg.data or folder, f"{folder}/download")[: cfg.rounds * cfg.batch_size]

    def answer_batch(options, number):
        indices = range(len(problems))[number * cfg.batch_size :][: cfg.batch_size]
        decoding = EvalConfig(task="gsm8k", temperature=0.1, dtype=cfg.dtype, **options)
        return answer_problems(model, tokenizer, indices, [problems[i] for i in indices], decoding)

    first, rules = "one token a pass", {"one token a pass": {"steps": block_size}}
    rules |= {f"{steps} steps": {"steps": steps} for steps in (8, 4, 2, 1)}
    rules |= {f"threshold {p}": {"steps": block_size, "threshold": p} for p in (0.5, 0.9, 0.99)}
    ways = {name: functools.partial(answer_batch, options) for name, options in rules.items()}
    batches, seconds, _ = take_turns(ways, math.ceil(len(problems) / cfg.batch_size), device)
    print(f"{len(problems):,} problems in batches of {cfg.batch_size}, temperature 0.1, seed 0")
    print(f"{'':<20}{'passes':>8}{'problems/s':>12}{'speed-up':>18}{'accuracy':>16}")
    for name in rules:
        records = [record for batch in batches[name] for record in batch if record["thoughts"] is not None]
        passes, accuracy = (np.mean([r[key] for r in records]) for key in ("forward_passes", "acc"))
        error = math.sqrt(accuracy * (1 - accuracy) / len(records))
        speed, (times, spread) = len(records) / sum(seconds[name]), ratio(seconds[first], seconds[name])
        row = f"{name:<20}{passes:>8.1f}{speed:>12.1f}{f'{times:.2f} ± {spread:.2f}x':>18}"
        print(f"{row}{f'{accuracy:.1%} ± {error:.1%}':>16}")


def main():
    cfg, set_by = configurator.parse(BenchConfig, positional="part")
    _, _, device = setup_distributed(cfg.device)
    print(configurator.describe(cfg, set_by))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"torch {torch.__version__} on {name}, {torch.get_num_threads()} threads")
    bench_sample(cfg, device) if cfg.part == "sample" else bench_steps(cfg, device)


if __name__ == "__main__":
    configurator.run(main)
