"""Writes text with a trained model.

    python sample.py                                                     # free text
    python sample.py --prompt="Tom has 3 apples and" --num_samples=5
    python sample.py --prompt="Tom has [MASK:4] apples and [MASK:12]."   # infilling: gaps of 4 and of 12 tokens
    python sample.py --show=True                                         # watch it being denoised

The model, its tokenizer and its sizes come from the checkpoint. Samples go to stdout, one after another with a line of dashes
between them; what it took goes to stderr.
"""

import os
import re
import shutil
import sys
import time
from dataclasses import dataclass

import torch

import configurator
from model import MDM, generate, load_checkpoint
from prepare_data import load_tokenizer
from train import autocast, setup_distributed


@dataclass
class SampleConfig:
    out_dir: str = "out/arithmetic"  # folder of the checkpoint
    checkpoint: str = "ckpt.pt"  # ckpt.pt (the latest) or best.pt (lowest validation loss)
    prompt: str = ""  # text to go on from; [MASK] or [MASK:12] in it is a gap of 1 or 12 tokens to fill
    num_samples: int = 3  # texts, all in one batch
    length: int | None = None  # tokens of a text without gaps, prompt included; None: block_size
    steps: int = 64  # denoising steps; more are slower and better, up to one per token
    temperature: float = 0.7  # 0: always the likeliest token; 1: the model's own distribution
    remasking: str = "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    cfg_scale: float = 0.0  # classifier-free guidance towards the prompt; 0 = off, else twice the work
    show: bool = False  # redraw the first text at every step: hidden places dim, new tokens bright
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16


def encode_prompt(prompt, tokenizer, mask_id):
    """Token ids of a prompt, mask_id for every token of a gap, and whether there are gaps."""
    ids = []
    texts_and_gaps = re.split(r"\[MASK(?::(\d+))?\]", prompt.replace("[MASK]", "[MASK:1]"))
    for i, part in enumerate(texts_and_gaps):
        ids += [mask_id] * int(part) if i % 2 else tokenizer.encode(part, allowed_special="all")
    return ids, len(texts_and_gaps) > 1


def start_of_text(cfg, meta, tokenizer, config):
    """(1, T) ids to denoise, and how many of them come before the text: a corpus of many documents starts with end-of-text,
    because that is what the model has seen before the start of a document."""
    opening = [meta["eot_id"]] if meta["documents"] > 1 else []
    ids, has_gaps = encode_prompt(cfg.prompt, tokenizer, config.mask_id)
    length = cfg.length or config.block_size
    ids = opening + ids
    if len(ids) > config.block_size or length > config.block_size:
        what = f"prompt and gaps ({len(ids)} tokens)" if len(ids) > config.block_size else f"length {length}"
        raise ValueError(f"{what} exceed block_size {config.block_size}; shorten them, or train with a larger block_size")
    if not has_gaps:
        if len(ids) >= length:
            raise ValueError(f"the prompt has {len(ids)} tokens, which leaves nothing to write in a length of {length}")
        ids += [config.mask_id] * (length - len(ids))
    if config.mask_id not in ids:
        raise ValueError("the prompt leaves nothing to write: its gaps have no tokens")
    return torch.tensor([ids]), len(opening)


class Show:
    """on_step for generate: draws the first row in place in a terminal, and as plain lines elsewhere."""

    def __init__(self, x, tokenizer, mask_id, opening):
        self.before, self.tokenizer, self.mask_id, self.opening = x[0], tokenizer, mask_id, opening
        self.step, self.height, self.is_terminal = 0, 0, sys.stdout.isatty()

    def __call__(self, x):
        self.step += 1
        lines, width = [""], 0
        columns = shutil.get_terminal_size().columns
        for token, old in list(zip(x[0].tolist(), self.before.tolist()))[self.opening :]:
            hidden = token == self.mask_id
            text = "_" if hidden else self.tokenizer.decode([token])
            style = "\033[2m" if hidden else "\033[1;32m" if old == self.mask_id else ""
            for character in text if self.is_terminal else text.replace("\n", "⏎"):
                if character == "\n" or (self.is_terminal and width == columns):
                    lines.append("")
                    width = 0
                if character != "\n":
                    character = character if character.isprintable() else "�"  # a tab would upset the count of columns
                    lines[-1] += f"{style}{character}\033[0m" if self.is_terminal and style else character
                    width += 1
        self.before = x[0]
        if not self.is_terminal:
            print(f"step {self.step:>3}  {lines[0]}")
            return
        back = f"\033[{self.height}A\033[J" if self.height else ""
        print(back + f"step {self.step}\n" + "\n".join(lines), flush=True)
        self.height = len(lines) + 1
        time.sleep(0.05)  # slow enough to follow


def main():
    cfg, _ = configurator.parse(SampleConfig)
    if cfg.num_samples < 1:
        raise ValueError(f"num_samples is {cfg.num_samples}; it must be at least 1")
    _, _, device = setup_distributed(cfg.device)
    checkpoint = load_checkpoint(os.path.join(cfg.out_dir, cfg.checkpoint))
    model, meta = MDM.from_checkpoint(checkpoint).to(device), checkpoint["meta"]
    tokenizer = load_tokenizer(meta["tokenizer"])
    start, opening = start_of_text(cfg, meta, tokenizer, model.config)
    x = start.expand(cfg.num_samples, -1).to(device)
    show = Show(start, tokenizer, model.config.mask_id, opening) if cfg.show else None

    torch.manual_seed(cfg.seed)
    start_time = time.time()
    with autocast(device, cfg.dtype):
        x, n_forward = generate(model, x, cfg.steps, cfg.temperature, cfg.remasking, cfg.cfg_scale, on_step=show)
    seconds = time.time() - start_time

    has_gaps = "[MASK" in cfg.prompt
    for i, row in enumerate(x[:, opening:].tolist()):
        if not has_gaps and meta["eot_id"] in row:  # the document ends here; behind it the model began another one
            row = row[: row.index(meta["eot_id"])]
        print(("---\n" if i else "") + tokenizer.decode(row))
    n_tokens = int((start == model.config.mask_id).sum()) * cfg.num_samples
    rate = "" if cfg.show else f", {n_tokens / seconds:,.0f} tokens/s"
    print(f"{n_tokens} tokens in {seconds:.2f} s{rate}, {n_forward} forward passes of {cfg.num_samples} rows", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)
