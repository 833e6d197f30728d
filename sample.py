"""Writes text with a trained model.

    python sample.py --show                                                      # watch the denoising
    python sample.py --prompt="Question: Tom has 3 apples and" --num_samples=5   # continues the prompt
    python sample.py --prompt="Tom has [MASK:2] apples [MASK] buys 4 more."      # fills gaps: 2 tokens and 1
    python sample.py --out_dir=out/sft-arithmetic --question="Tom has 3 apples and buys 4 more. How many now?"
Samples go to stdout, with a line of dashes between them; what they took goes to stderr."""

import re
import sys
import time
from dataclasses import dataclass

import torch

import configurator
from model import MDM, generate, load_checkpoint, seed_for
from prepare_data import load_tokenizer, open_text
from sft_gsm8k import answer, is_fine_tuned
from train import autocast, setup_distributed


@dataclass
class SampleConfig:
    out_dir: str = "out/arithmetic"  # the checkpoint: a folder (its ckpt.pt), or a file such as out/x/best.pt
    prompt: str = ""  # text to continue, or FILE:x.txt; [MASK:12] in it is a gap of 12 tokens, [MASK] of one
    question: str = ""  # for a model of sft_gsm8k.py, which writes its thoughts and then the answer
    num_samples: int | None = None  # texts, all in one batch; None: 3, or 1 for a question
    length: int | None = None  # tokens of a text, prompt included; None: as many as the model takes
    steps: int = 64  # denoising steps; more are slower and better, up to one per token
    temperature: float | None = None  # 0: the likeliest token; 1: the model's distribution; None: 0.7, or 0.1
    remasking: str = "confidence"  # keep the surest tokens first; random: the exact reverse process
    threshold: float | None = None  # with confidence: keep every token above this probability; 0.9 is usual
    cfg_scale: float = 0.0  # classifier-free guidance towards the prompt; above 0, twice the work
    show: bool = False  # draw every step of the first text: hidden tokens dim, new tokens bright
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16

    def __post_init__(self):
        if self.prompt and self.question:
            raise ValueError("got a prompt and a question; leave one of them out")
        if self.num_samples is None:
            self.num_samples = 1 if self.question else 3
        if self.num_samples < 1 or self.seed < 0:
            raise ValueError("wanted num_samples of at least 1, and seed of at least 0")
        if self.temperature is None:
            self.temperature = 0.1 if self.question else 0.7
        if self.prompt.startswith("FILE:"):
            with open_text(self.prompt[5:]) as file:
                self.prompt = file.read().removesuffix("\n")  # which an editor adds


def readable(tokenizer, token):
    """A token as text that a terminal can show."""
    text = "∎" if token == tokenizer.eot_token else tokenizer.decode([token])
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def show_steps(tokenizer, mask_id):
    """on_step of generate: draws the first text after each step, in place in a terminal, else as a line."""
    step, before, in_place = 0, None, sys.stdout.isatty()

    def on_step(x):
        nonlocal step, before
        row, step, text = x[0].tolist(), step + 1, ""
        for token, old in zip(row, before or row):
            part = "_" if token == mask_id else readable(tokenizer, token)
            style = 2 if token == mask_id else 92 if token != old else 0  # dim, bright green, plain
            text += f"\033[{style}m{part}\033[0m" if in_place else part
        print(f"\033[H\033[Jstep {step}\n{text}" if in_place else f"step {step:>3}  {text!r}", flush=True)
        time.sleep(0.05 if in_place else 0)  # slow enough to follow
        before = row

    return on_step


def load_trained(path, device):
    """(model, tokenizer, checkpoint) of a checkpoint. Raises ValueError if it has no tokenizer."""
    ckpt = load_checkpoint(path)
    if not ckpt["meta"]:
        raise ValueError(f"{path} has no tokenizer: it was trained without a prepared data set")
    return MDM.from_checkpoint(ckpt).to(device), load_tokenizer(ckpt["meta"]["tokenizer"]), ckpt


def without_last_blank(text, tokenizer, vocab_size):
    """text before a token that is to be written: if the vocabulary has words that begin with a blank, a blank
    at the end of text is the first character of that token."""
    words = (tokenizer.decode([token]) for token in range(vocab_size))
    if text.endswith(" ") and any(word[:1] == " " and word[1:].strip() for word in words):
        return text[:-1]
    return text


def encode_prompt(prompt, tokenizer, mask_id):
    """Token ids of a prompt, with mask_id for every token of its gaps."""
    ids, parts = [], re.split(r"\[MASK:(\d{1,6})\]", prompt.replace("[MASK]", "[MASK:1]"))
    for text, gap in zip(parts[::2], [*parts[1::2], None]):
        if gap or len(parts) == 1:  # a gap or the continuation follows
            text = without_last_blank(text, tokenizer, mask_id)
        ids += tokenizer.encode(text, allowed_special="all") + [mask_id] * int(gap or 0)
    return ids


def sample(cfg, model, tokenizer, opens_with_eot, **options):
    """Texts that continue the prompt or fill its gaps, and the forward passes of each."""
    eot_id, mask_id, room = tokenizer.eot_token, model.config.mask_id, model.config.block_size
    opening = [eot_id] if opens_with_eot else []  # as in training
    given = opening + encode_prompt(cfg.prompt, tokenizer, mask_id)
    length = len(opening) + cfg.length if cfg.length else room
    start = given if mask_id in given else given + [mask_id] * (length - len(given))
    if mask_id not in start or len(start) > room:
        raise ValueError(f"prompt {len(given)}, text {len(start)}, room {room} tokens; shorten one of them")
    stop = None if mask_id in given else eot_id  # a gap is filled to its end
    x, passes = generate(model, torch.tensor([start] * cfg.num_samples), eot_id=stop, **options)
    rows = [row + [eot_id] for row in x.tolist()]
    texts = [tokenizer.decode(row[len(opening) : row.index(eot_id, len(given))]) or "(empty)" for row in rows]
    return texts, passes.tolist()


def ask(cfg, model, tokenizer, **options):
    """Thoughts and answers to the question, and the forward passes of each."""
    answers = answer(model, tokenizer, [cfg.question] * cfg.num_samples, length=cfg.length, **options)
    shown = {None: "(no room left)", "": "(empty)"}
    texts = [f"{shown.get(first, first)}\n{shown.get(second, second)}" for first, second, _ in answers]
    return texts, [passes for _, _, passes in answers]


def main():
    cfg, _ = configurator.parse(SampleConfig)
    _, _, device = setup_distributed(cfg.device)
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, device)
    if cfg.question and not is_fine_tuned(checkpoint):
        print("note: this model was not fine-tuned to answer; sft_gsm8k.py does that", file=sys.stderr)
    keys = ("steps", "temperature", "remasking", "threshold", "cfg_scale")
    options = {key: getattr(cfg, key) for key in keys}
    options["seeds"] = [seed_for(cfg.seed, i) for i in range(cfg.num_samples)]
    options["on_step"] = show_steps(tokenizer, model.config.mask_id) if cfg.show else None
    start = time.perf_counter()
    with autocast(device, cfg.dtype):
        if cfg.question:
            texts, passes = ask(cfg, model, tokenizer, **options)
        else:
            texts, passes = sample(cfg, model, tokenizer, checkpoint["meta"]["opens_with_eot"], **options)
    print("\n---\n".join(texts))
    took = f"{time.perf_counter() - start:.2f} s, {sum(passes) / len(passes):.1f} forward passes each"
    print(f"{len(texts)} texts in {took}", file=sys.stderr)


if __name__ == "__main__":
    configurator.run(main)
