"""Speed, as ratios of ways to do the same, measured in turns in one run.

    python bench.py eval --data=piqa.jsonl                    # likelihood requests, against one request at a time
    python bench.py eval --data=piqa.jsonl --out_dir=out/x    # with a trained model instead of random weights

eval: a request is a choice of an item, scored by Monte Carlo. The yardstick is the plain loop: the draws of one request are one
batch, the head runs at every place, coins decide what is hidden. Beside the speed stands the standard deviation of an estimate
over seeds (root mean square over requests), because a way with less of it needs fewer draws.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import configurator
from eval import encode_pair, fit, read_items, score
from model import MDM, MDMConfig, mask_tokens
from prepare_data import load_tokenizer, make_tokenizer
from sample import load_trained
from train import autocast, setup_distributed


@dataclass
class BenchConfig:
    what: str = "eval"  # what to measure: eval
    data: str | None = None  # eval: a .jsonl file of items with choices
    preset: str = "6M"  # size of the model with random weights and GPT-2's vocabulary
    n_sink: int = 1  # its sink tokens
    out_dir: str | None = None  # instead of it, the model of this folder's ckpt.pt, with its own tokenizer
    requests: int = 200  # how many to score
    mc_num: int = 32  # draws of each
    n_parts: int = 5  # parts of the requests, which each way scores in turn; speeds are medians over them
    n_seeds: int = 8  # estimates of a request, for the standard deviation
    batch_tokens: int = 4096  # tokens of a forward pass, padding included
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16

    def __post_init__(self):
        if self.what not in BENCHES:
            raise ValueError(f"cannot measure {self.what!r}; there is {', '.join(BENCHES)}")
        if min(self.requests, self.mc_num, self.n_parts, self.n_seeds - 1, self.batch_tokens) < 1:
            raise ValueError("wanted requests, mc_num, n_parts and batch_tokens >= 1, and n_seeds >= 2")


@torch.no_grad()
def one_at_a_time(model, pairs, mc_num, seed, dtype="auto"):
    """Monte-Carlo -log p(target | context) of each pair, in nats, in the plainest way."""
    generator, nlls = torch.Generator().manual_seed(seed), []
    for context, target in pairs:
        x0 = torch.tensor([*context, *target]).expand(mc_num, -1)
        maskable = torch.arange(x0.size(1)).expand_as(x0) >= len(context)
        t = (torch.rand((), generator=generator) + torch.arange(mc_num)[:, None] / mc_num) % 1
        xt, masked = mask_tokens(x0, t, maskable, model.config.mask_id, torch.rand(x0.shape, generator=generator))
        with autocast(model.lm_head.weight.device, dtype):
            logits = model(xt.to(model.lm_head.weight.device)).float().cpu()
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
    pairs = [encode_pair(tokenizer, item["context"], " " + choice) for item in items for choice in item["choices"]][: cfg.requests]
    pairs = [fit(*pair, model.config.block_size) for pair in pairs]
    few = max(1, cfg.mc_num // 4)
    ways = {
        f"one request at a time, coins, {cfg.mc_num} draws": lambda p, seed: one_at_a_time(model, p, cfg.mc_num, seed, cfg.dtype)
    }
    for mc_masking, mc_num in (("coins", cfg.mc_num), ("exact", cfg.mc_num), ("exact", few)):
        options = {"mc_masking": mc_masking, "mc_num": mc_num, "batch_tokens": cfg.batch_tokens, "dtype": cfg.dtype}
        ways[f"batched, {mc_masking}, {mc_num} draws"] = lambda p, seed, o=options: score(model, p, seed=seed, **o)
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
        speed = statistics.median(a / b for a, b in zip(rates[name], rates[plain]))
        sd, mean = np.sqrt(estimates[name].var(axis=0, ddof=1).mean()), estimates[name].mean()
        print(f"{name:<42} {statistics.median(rates[name]):>10.2f} {speed:>6.2f}x {sd:>9.2f} {mean:>11.2f}")


BENCHES = {"eval": bench_eval}


def main():
    cfg, set_by = configurator.parse(BenchConfig, positional="what")
    _, _, device = setup_distributed(cfg.device)
    print(configurator.describe(cfg, set_by))
    BENCHES[cfg.what](cfg, device)


if __name__ == "__main__":
    configurator.run(main)
