"""Speed and memory, as ratios of ways to do the same, measured in turns in one run.

    python bench.py sink                                   # a training step: vanilla, sink as mask, sink apart (split), gate
    python bench.py train --compile=True                   # a training step: the head everywhere or where tokens are hidden
    python bench.py loss --vocab_size=50304 --batch_size=32   # head and loss alone: at all places, at the hidden ones, in parts
    python bench.py sample --out_dir=out/sft-arithmetic    # decoding rules: passes, speed and accuracy on the test problems
    python bench.py eval --data=piqa.jsonl                 # likelihood requests, against one request at a time

A step is forward and backward pass, without the optimizer. Every way has the same weights, texts and masks, and runs once to warm
up. Then they take turns: seconds are medians, and a ratio is the median of the ratios to the first way in the same round. Memory is
the peak of one step, beside what lasts: on a GPU what torch allocates, on a CPU (Linux) how much a process of its own grows.

eval: a request is a choice of an item, scored by Monte Carlo. The yardstick is the plain loop: the draws of one request are one
batch, the head runs at every place, coins decide what is hidden. Beside the speed stands the standard deviation of an estimate
over seeds (root mean square over requests), because a way with less of it needs fewer draws.
"""

import ctypes
import gc
import math
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import configurator
from eval import EvalConfig, Trained, answer_problems, encode_pair, fit, read_items, read_problems, score
from model import MDM, MDMConfig, mask_tokens, weighted_nll
from prepare_data import load_tokenizer, make_tokenizer
from sample import load_trained
from train import autocast, compile_model, peak_flops, setup_distributed


@dataclass
class BenchConfig:
    what: str = "sink"  # what to measure: sink, train, loss, sample or eval
    preset: str = "6M"  # size of the model with random weights
    vocab_size: int = 32000  # its tokens; eval takes GPT-2's
    batch_size: int = 2  # sequences of a step; sample: problems at once
    block_size: int = 512  # their tokens
    n_sink: int = 1  # sink tokens, where there are any
    sink_attention: str = "mask"  # train: mask or split; sink measures both
    compile: bool = False  # sink, train, loss: each way also with torch.compile
    rounds: int = 20  # how often each way is timed
    out_dir: str | None = None  # sample, eval: the model of this folder's ckpt.pt, with its own tokenizer
    data: str | None = (
        None  # eval: a .jsonl file of items with choices; sample: problems; None: those of the training data
    )
    requests: int = 200  # eval: how many to score
    mc_num: int = 32  # eval: draws of each
    n_parts: int = 5  # eval, sample: parts of the items, which each way takes in turn
    n_seeds: int = 8  # eval: estimates of a request, for the standard deviation
    batch_tokens: int = 4096  # eval: tokens of a forward pass, padding included
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16

    def __post_init__(self):
        if self.what not in BENCHES:
            raise ValueError(f"cannot measure {self.what!r}; there is {', '.join(BENCHES)}")
        for name in "batch_size block_size rounds requests mc_num n_parts batch_tokens".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_seeds < 2:
            raise ValueError("n_seeds is 1; a standard deviation needs at least 2")


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def make_step(cfg, device, flags, head="where hidden", compiled=False):
    """(step, model): step() is one forward and backward pass of the variant that flags name, and returns the loss.

    head    'where hidden' is the loss that training uses; 'everywhere' takes the loss of all tokens and then that of the hidden
            ones; 'at all places', 'at hidden places' (at once) and 'in parts' (as in training) run the last norm, head and loss
            alone, on states that are given"""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(cfg.vocab_size, (cfg.batch_size, cfg.block_size), generator=generator)
    p_mask = (
        torch.arange(cfg.batch_size)[:, None] + 0.5
    ) / cfg.batch_size  # evenly spread: half of the tokens are hidden
    noise, everywhere = torch.rand(x0.shape, generator=generator), torch.ones_like(x0, dtype=torch.bool)
    xt, masked = mask_tokens(x0, p_mask, everywhere, cfg.vocab_size, noise)
    torch.manual_seed(0)
    model = MDM(
        MDMConfig.preset(cfg.preset, vocab_size=cfg.vocab_size, block_size=cfg.block_size, **flags)
    ).to(device)
    if compiled:
        compile_model(model, xt.shape)
    states = torch.randn(*x0.shape, model.config.n_embd, device=device, requires_grad=True)
    if head in ("at all places", "at hidden places", "in parts"):
        model.hidden_states = lambda xt: states
    if head == "at hidden places":
        model.nll = model.nll_of_part

    def loss():
        if head not in ("everywhere", "at all places"):
            return weighted_nll(model, x0, xt, masked, p_mask).sum()
        nll = model.nll_of_part(
            model.hidden_states(xt.to(device)).flatten(0, 1), x0.flatten().to(device)
        ).view(x0.shape)
        return (nll * masked.to(device) / p_mask.to(device)).sum()

    def step():
        with autocast(device, cfg.dtype):
            found = loss()
        found.backward()
        model.zero_grad(set_to_none=True)
        return found.item()  # waits for a GPU

    return step, model


def memory(key):
    """Bytes of this process: VmRSS (now) or VmHWM (most since it was reset); Linux only."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))


def growth(cfg, *way):
    """By how many bytes a process grows in one step, at most. Run it in a process of its own."""
    step, _ = make_step(cfg, torch.device("cpu"), *way)
    step()  # compiles, and makes what lasts
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    before = memory("VmRSS")
    step()
    return memory("VmHWM") - before


def peak_memory(cfg, device, step, way):
    """Bytes that one step takes at most, beside what lasts; None where that cannot be told."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    if device.type != "cpu" or not os.path.exists("/proc/self/clear_refs"):
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(growth, cfg, *way).result()


class AttentionKernel(TorchDispatchMode):
    """Records what scaled_dot_product_attention runs on; nothing if on plain matrix products."""

    name = "math"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith("_scaled_dot_product_") and "backward" not in func.__name__:
            self.name = func.__name__.removeprefix("_scaled_dot_product_").removesuffix(".default")
        return func(*args, **(kwargs or {}))


def take_turns(ways, rounds):
    """Seconds of each way (a function) in each round."""
    for way in ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds, name, first):
    """Median of the ratios to the first way, and about its standard error."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[first])]
    middle = statistics.median(ratios)
    spread = statistics.median(abs(r - middle) for r in ratios)  # of a normal distribution 0.67 sd
    return middle, 1.25 * 1.48 * spread / math.sqrt(len(ratios))


def bench_steps(cfg, device, ways):
    """Times training steps, ways {name: (flags, head) of make_step}, and prints a table. The kernel of attention is that
    of the way that is not compiled."""
    made, losses, kernels = {}, {}, {}
    for compiled in (False, True)[: 1 + cfg.compile]:
        for name, way in ways.items():
            label = f"{name}, compiled" if compiled else name
            step, model = make_step(cfg, device, *way, compiled)
            made[label] = step, model, (*way, compiled)
            if compiled:
                losses[label], kernels[label] = step(), kernels[name]
            else:
                with AttentionKernel() as kernels[label]:
                    losses[label] = step()
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device}, {torch.get_num_threads()} threads"
    )
    first, peak = next(iter(ways)), peak_flops(device)
    size = f"{made[first][1].num_params():,} non-embedding parameters, vocabulary {cfg.vocab_size:,}"
    print(f"{size}, {cfg.batch_size} x {cfg.block_size} tokens, {where}, torch {torch.__version__}")
    seconds = take_turns({label: step for label, (step, _, _) in made.items()}, cfg.rounds)
    print(f"{'':<28} {'ms':>8} {'time':>16} {'tokens/s':>9} {'MFU':>6} {'peak MB':>8} {'loss':>9}  attention")
    for name, (step, model, way) in made.items():
        median, (middle, error) = statistics.median(seconds[name]), ratio(seconds, name, first)
        rate = cfg.batch_size * cfg.block_size / median
        mfu = (
            f"{model.flops_per_token(cfg.block_size) * rate / peak:.1%}"
            if peak and cfg.what != "loss"
            else "-"
        )
        most = peak_memory(cfg, device, step, way)
        most = "-" if most is None else f"{most / 1e6:,.0f}"
        print(
            f"{name:<28} {1e3 * median:>8.1f} {f'{middle:.3f} ± {error:.3f}x':>16} {rate:>9,.0f} {mfu:>6} {most:>8} "
            f"{losses[name]:>9.6g}  {kernels[name].name}"
        )


def bench_sink(cfg, device):
    ways = {
        "vanilla": {"n_sink": 0},
        "sink, mask": {"n_sink": cfg.n_sink, "sink_attention": "mask"},
        "sink, split": {"n_sink": cfg.n_sink, "sink_attention": "split"},
        "gate": {"n_sink": 0, "gated_attention": True},
    }
    bench_steps(cfg, device, {name: (flags, "where hidden") for name, flags in ways.items()})


def bench_train(cfg, device):
    flags = {"n_sink": cfg.n_sink, "sink_attention": cfg.sink_attention}
    bench_steps(
        cfg, device, {"head everywhere": (flags, "everywhere"), "head where hidden": (flags, "where hidden")}
    )


def bench_loss(cfg, device):
    bench_steps(
        cfg,
        device,
        {head: ({"n_sink": 0}, head) for head in ("at all places", "at hidden places", "in parts")},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def bench_sample(cfg, device):
    """Fixed numbers of steps, and tokens as soon as they are sure; from left to right, and with what is left of a block kept."""
    if cfg.out_dir is None:
        raise ValueError("sample needs a model that answers problems: --out_dir=out/sft-arithmetic")
    trained = Trained(*load_trained(cfg.out_dir, "ckpt.pt", device), rank=0, world_size=1)
    folder = f"{trained.checkpoint['run_config']['data_dir']}/{trained.checkpoint['meta']['name']}"
    problems = [
        (i, *problem)
        for i, problem in enumerate(read_problems(cfg.data or f"{folder}/test.txt", f"{folder}/download"))
    ]
    block_size = trained.model.config.block_size
    block_length, one = max(1, block_size // 4), {"steps": block_size}
    rules = {"one token a pass": one}
    rules |= {f"{steps} steps": {"steps": steps} for steps in (8, 4, 2, 1)}
    rules |= {f"threshold {threshold}": one | {"threshold": threshold} for threshold in (0.5, 0.9, 0.99)}
    for name, options in {"one token a pass": one, "threshold 0.9": one | {"threshold": 0.9}}.items():
        blocks = options | {"block_length": block_length}
        rules[f"{name}, blocks of {block_length}"] = blocks
        rules[f"{name}, blocks, prefix cache"] = blocks | {"prefix_cache": True}

    records = {name: [] for name in rules}
    seconds = {name: [] for name in rules}
    for part in np.array_split(np.arange(len(problems)), min(cfg.n_parts, len(problems))):
        for name, options in rules.items():
            start, how = time.perf_counter(), EvalConfig(temperature=0.1, dtype=cfg.dtype, **options)
            for chunk in np.array_split(part, math.ceil(len(part) / cfg.batch_size)):
                records[name] += answer_problems(how, trained, [problems[i] for i in chunk])
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(rules))
    print(f"{len(problems):,} problems in batches of {cfg.batch_size}, temperature 0.1, seed 0, {device}")
    print(f"{'':<38} {'passes':>7} {'problems/s':>10} {'speed':>7}  accuracy")
    for name in rules:
        accuracy, passes = (
            np.mean([record[key] for record in records[name]]) for key in ("correct", "forward_passes")
        )
        error = math.sqrt(accuracy * (1 - accuracy) / len(problems))
        rate, (speed, _) = len(problems) / sum(seconds[name]), ratio(seconds, first, name)
        print(f"{name:<38} {passes:>7.1f} {rate:>10.1f} {speed:>6.2f}x  {accuracy:.1%} ± {error:.1%}")


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood requests


@torch.no_grad()
def one_at_a_time(model, pairs, mc_num, seed, dtype="auto"):
    """Monte-Carlo -log p(target | context) of each pair, in nats, in the plainest way."""
    generator, nlls = torch.Generator().manual_seed(seed), []
    for context, target in pairs:
        x0 = torch.tensor([*context, *target]).expand(mc_num, -1)
        maskable = torch.arange(x0.size(1)).expand_as(x0) >= len(context)
        t = (torch.rand((), generator=generator) + torch.arange(mc_num)[:, None] / mc_num) % 1
        xt, masked = mask_tokens(
            x0, t, maskable, model.config.mask_id, torch.rand(x0.shape, generator=generator)
        )
        with autocast(model.device, dtype):
            logits = model(xt.to(model.device)).float().cpu()
        nll = F.cross_entropy(logits[masked], x0[masked], reduction="none") / t.expand_as(x0)[masked]
        nlls.append(nll.sum().item() / mc_num)
    return np.array(nlls)


def bench_eval(cfg, device):
    if cfg.data is None:
        raise ValueError("eval needs items with choices: --data=file.jsonl")
    if cfg.out_dir:
        model, tokenizer, _ = load_trained(cfg.out_dir, "ckpt.pt", device)
    else:
        tokenizer = load_tokenizer(make_tokenizer("gpt2", split_digits=False, vocab_size=0, texts=[]))
        torch.manual_seed(0)
        model = MDM(MDMConfig.preset(cfg.preset, vocab_size=tokenizer.n_vocab, n_sink=cfg.n_sink)).to(device)
    items = read_items(cfg.data)
    if "choices" not in items[0]:
        raise ValueError(f"{cfg.data} has items with targets; wanted choices")
    pairs = [
        encode_pair(tokenizer, item["context"], " " + choice) for item in items for choice in item["choices"]
    ][: cfg.requests]
    pairs = [fit(*pair, model.config.block_size) for pair in pairs]
    few = max(1, cfg.mc_num // 4)
    ways = {
        f"one request at a time, coins, {cfg.mc_num} draws": lambda p, seed: one_at_a_time(
            model, p, cfg.mc_num, seed, cfg.dtype
        )
    }
    for mc_masking, mc_num in (("coins", cfg.mc_num), ("exact", cfg.mc_num), ("exact", few)):
        options = {
            "mc_masking": mc_masking,
            "mc_num": mc_num,
            "batch_tokens": cfg.batch_tokens,
            "dtype": cfg.dtype,
        }
        ways[f"batched, {mc_masking}, {mc_num} draws"] = lambda p, seed, o=options: score(
            model, p, seed=seed, **o
        )
    context, target = (np.mean([len(pair[i]) for pair in pairs]) for i in (0, 1))
    print(
        f"{len(pairs)} requests of {context:.0f} + {target:.0f} tokens, {model.num_params():,} non-embedding parameters, {device}"
    )

    rates, estimates = {way: [] for way in ways}, {way: [] for way in ways}
    parts = [part for part in np.array_split(np.arange(len(pairs)), min(cfg.n_parts, len(pairs)))]
    for way in ways.values():  # warm-up
        way(pairs[:4], 0)
    for part in parts:
        for name, way in ways.items():
            start = time.perf_counter()
            way([pairs[i] for i in part], 0)
            rates[name].append(len(part) / (time.perf_counter() - start))
    spread = pairs[:: max(1, len(pairs) // 16)][:16]
    for name, way in ways.items():
        estimates[name] = np.array([way(spread, seed) for seed in range(cfg.n_seeds)])
    plain = next(iter(ways))
    print(f"{'':<42} {'requests/s':>10} {'speed':>7} {'sd, nats':>9} {'mean, nats':>11}")
    for name in ways:
        speed, _ = ratio(rates, name, plain)
        sd, mean = np.sqrt(estimates[name].var(axis=0, ddof=1).mean()), estimates[name].mean()
        print(f"{name:<42} {statistics.median(rates[name]):>10.2f} {speed:>6.2f}x {sd:>9.2f} {mean:>11.2f}")


BENCHES = {
    "sink": bench_sink,
    "train": bench_train,
    "loss": bench_loss,
    "sample": bench_sample,
    "eval": bench_eval,
}


def main():
    cfg, set_by = configurator.parse(BenchConfig, positional="what")
    _, _, device = setup_distributed(cfg.device)
    print(configurator.describe(cfg, set_by))
    BENCHES[cfg.what](cfg, device)


if __name__ == "__main__":
    configurator.run(main)
