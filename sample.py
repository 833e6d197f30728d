"""Writes text with a trained model.

    python sample.py                                                     # free text
    python sample.py --prompt="Question: Tom has 3 apples and" --num_samples=5
    python sample.py --prompt="Question: Tom has [MASK:2] apples and [MASK:4]."   # infilling: gaps of 2 and of 4 tokens
    python sample.py --show=True                                         # watch it being denoised
    python sample.py --out_dir=out/sft-arithmetic --question="Tom has 3 apples and buys 4 more. How many now?"

The model, its tokenizer and its sizes come from the checkpoint. Samples go to stdout, one after another with a line of dashes
between them; what it took goes to stderr.
"""

import os
import re
import sys
import time
from dataclasses import dataclass

import torch

import configurator
from model import MDM, check_decoding, generate, load_checkpoint
from prepare_data import load_tokenizer
from sft_gsm8k import solve
from train import autocast, seed_for, setup_distributed


@dataclass
class SampleConfig:
    out_dir: str = "out/arithmetic"  # folder of the checkpoint
    checkpoint: str = "ckpt.pt"  # ckpt.pt (the latest) or best.pt (lowest validation loss)
    prompt: str = ""  # text to go on from; [MASK] or [MASK:12] in it is a gap of 1 or 12 tokens to fill
    question: str | None = (
        None  # to a model fine-tuned by sft_gsm8k.py, which writes its thoughts and then the answer
    )
    num_samples: int | None = None  # texts, all in one batch; None: 3, or 1 for a question
    length: int | None = (
        None  # tokens of a text without gaps, prompt or question included; None: as many as the model takes
    )
    steps: int = 64  # denoising steps; more are slower and better, up to one per token
    temperature: float | None = (
        None  # 0: the likeliest token; 1: the model's own distribution; None: 0.7, 0.1 for a question
    )
    remasking: str = (
        "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    )
    cfg_scale: float = 0.0  # classifier-free guidance towards the prompt; 0 = off, else twice the work
    threshold: float | None = (
        None  # with confidence: keep all tokens above this probability: fewer passes; 0.9 is usual
    )
    block_length: int | None = None  # with confidence: write from left to right, so many places at a time
    prefix_cache: bool = (
        False  # with block_length: compute what is left of a block once a block; an approximation
    )
    show: bool = False  # redraw the first text at every step: hidden places dim, new tokens bright
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16

    def __post_init__(self):
        asks = self.question is not None
        if asks and self.prompt:
            raise ValueError("a prompt and a question are both set; leave out one of them")
        self.num_samples = (1 if asks else 3) if self.num_samples is None else self.num_samples
        self.temperature = (0.1 if asks else 0.7) if self.temperature is None else self.temperature
        if self.num_samples < 1 or self.seed < 0:
            raise ValueError(f"wanted num_samples >= 1 and seed >= 0; got {self.num_samples} and {self.seed}")
        check_decoding(**self.decoding())

    def decoding(self):
        """Options of generate."""
        keys = "steps temperature remasking cfg_scale threshold block_length prefix_cache"
        return {key: getattr(self, key) for key in keys.split()}


def load_trained(out_dir, name, device):
    """(model on device, its tokenizer, checkpoint) of the checkpoint out_dir/name. Raises ValueError if it has no tokenizer, or
    weights that are not finite."""
    checkpoint = load_checkpoint(os.path.join(out_dir, name))
    if checkpoint["meta"] is None:
        raise ValueError("the checkpoint carries no tokenizer: it was trained without a prepared data set")
    broken = [name for name, tensor in checkpoint["model"].items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{os.path.join(out_dir, name)} holds weights that are not finite, in {broken[0]}; take an earlier checkpoint"
        )
    return (
        MDM.from_checkpoint(checkpoint).to(device),
        load_tokenizer(checkpoint["meta"]["tokenizer"]),
        checkpoint,
    )


def encode_prompt(prompt, tokenizer, mask_id):
    """Token ids of a prompt, mask_id for every token of a gap, and whether there are gaps."""
    ids = []
    texts_and_gaps = re.split(r"\[MASK(?::(\d+))?\]", prompt.replace("[MASK]", "[MASK:1]"))
    for i, part in enumerate(texts_and_gaps):
        if i % 2 and len(part) > 6:
            raise ValueError(f"a gap of {part[:20]} tokens is longer than any model's text")
        ids += [mask_id] * int(part) if i % 2 else tokenizer.encode(part, allowed_special="all")
    return ids, len(texts_and_gaps) > 1


def start_of_text(cfg, meta, tokenizer, config):
    """What to denoise, (1, T) ids; how many ids come before the prompt; and where a written text may end, None for infilling.

    A corpus of many documents starts with end-of-text, because that is what the model has seen before a document."""
    opening = [meta["eot_id"]] if meta["documents"] > 1 else []
    prompt, has_gaps = encode_prompt(cfg.prompt, tokenizer, config.mask_id)
    room = config.block_size - len(opening)
    length = len(prompt) if has_gaps else room if cfg.length is None else cfg.length
    if max(length, len(prompt)) > room:
        what = f"the prompt and its gaps ({len(prompt)} tokens)" if len(prompt) > room else f"length {length}"
        raise ValueError(
            f"{what} exceeds the model's {room} tokens; shorten it, or train with a larger block_size"
        )
    ids = prompt + [config.mask_id] * (length - len(prompt))
    if config.mask_id not in ids:
        raise ValueError(
            f"nothing to write: the prompt has {len(prompt)} tokens, length is {length}; add a gap or raise length"
        )
    return torch.tensor([opening + ids]), len(opening), None if has_gaps else len(opening) + len(prompt)


class Show:
    """on_step for generate: redraws the first row in a terminal, and prints it as plain lines elsewhere. ∎ is end-of-text."""

    def __init__(self, x, tokenizer, mask_id, opening):
        self.before, self.tokenizer, self.mask_id, self.opening, self.step = (
            x[0],
            tokenizer,
            mask_id,
            opening,
            0,
        )

    def __call__(self, x):
        self.step += 1
        is_terminal = sys.stdout.isatty()
        text = ""
        for token, old in list(zip(x[0].tolist(), self.before.tolist()))[self.opening :]:
            hidden = token == self.mask_id
            part = (
                "_"
                if hidden
                else "∎"
                if token == self.tokenizer.eot_token
                else self.tokenizer.decode([token])
            )
            part = "".join(
                c if c.isprintable() or c == "\n" else "�" for c in part
            )  # no control characters of the model's own
            style = (
                "\033[2m" if hidden else "\033[1;32m" if token != old else ""
            )  # dim, bright green where new, plain
            text += f"{style}{part}\033[0m" if is_terminal and style else part
        self.before = x[0]
        if is_terminal:
            print(f"\033[H\033[Jstep {self.step}\n{text}", flush=True)  # from the top of a cleared screen
            time.sleep(0.05)  # slow enough to follow
        else:
            print(f"step {self.step:>3}  " + text.replace("\n", "⏎"))


def main():
    cfg, _ = configurator.parse(SampleConfig)
    _, _, device = setup_distributed(cfg.device)
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, cfg.checkpoint, device)
    meta, mask_id = checkpoint["meta"], model.config.mask_id
    torch.manual_seed(cfg.seed)
    options = cfg.decoding()
    start_time = time.time()
    if cfg.question is not None:
        show = (
            Show(torch.full((1, model.config.block_size), mask_id), tokenizer, mask_id, 0)
            if cfg.show
            else None
        )
        options["length"] = cfg.length
        seeds = [seed_for(cfg.seed, i) for i in range(cfg.num_samples)]
        with autocast(device, cfg.dtype):
            solved = solve(model, tokenizer, [cfg.question] * cfg.num_samples, seeds, options, options, show)
        if solved[0][0] is None:
            raise ValueError(
                "the question leaves no room for thoughts; shorten it, or raise --length if it is set"
            )
        lines = [
            "\n".join("(no room left)" if text is None else text for text in texts) for *texts, _ in solved
        ]
        print("\n---\n".join(lines))
        passes = sum(n for _, _, n in solved) / len(solved)
        print(f"{passes:.0f} forward passes an answer, {time.time() - start_time:.2f} s", file=sys.stderr)
        return

    start, opening, end = start_of_text(cfg, meta, tokenizer, model.config)
    x = start.expand(cfg.num_samples, -1).to(device)
    show = Show(start, tokenizer, mask_id, opening) if cfg.show else None
    eot_id = (
        None if end is None else meta["eot_id"]
    )  # what a model writes behind the end of a document is not wanted
    with autocast(device, cfg.dtype):
        x, n_forward = generate(model, x, **options, eot_id=eot_id, on_step=show)
    seconds = time.time() - start_time

    n_tokens = 0
    for i, row in enumerate(x.tolist()):
        if eot_id in row[end:]:
            row = row[: row.index(eot_id, end)]
        print(("---\n" if i else "") + tokenizer.decode(row[opening:]))
        n_tokens += int((start[0, : len(row)] == mask_id).sum())
    rate = f"{n_tokens / seconds:,.0f} tokens/s{' (slowed down to be watched)' if cfg.show else ''}"
    print(
        f"{n_tokens} tokens in {seconds:.2f} s, {rate}, {n_forward} forward passes of {cfg.num_samples} rows",
        file=sys.stderr,
    )


if __name__ == "__main__":
    configurator.run(main)
