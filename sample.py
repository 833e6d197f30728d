"""Writes text with a trained model.

    python sample.py                                                              # free text
    python sample.py --prompt="Question: Tom has 3 apples and" --num_samples=5    # continues the prompt
    python sample.py --prompt="Question: Tom has [MASK:2] apples and [MASK:4]."   # fills gaps of 2 and 4 tokens
    python sample.py --show=True                                                  # watch the denoising
    python sample.py --out_dir=out/sft-arithmetic --question="Tom has 3 apples and buys 4 more. How many now?"

Samples go to stdout, with a line of dashes between them; what they took goes to stderr.
"""

import os
import re
import sys
import time
from dataclasses import dataclass

import torch

import configurator
from model import MDM, generate, load_checkpoint, seed_for
from prepare_data import load_tokenizer
from sft_gsm8k import answer
from train import autocast, setup_distributed


@dataclass
class SampleConfig:
    out_dir: str = (
        "out/arithmetic"  # the checkpoint: its folder (for ckpt.pt), or a file such as out/x/best.pt
    )
    prompt: str = ""  # text to continue; [MASK] or [MASK:12] in it is a gap of 1 or 12 tokens to fill
    question: str | None = None  # for a model of sft_gsm8k.py, which writes its thoughts and then the answer
    num_samples: int | None = None  # texts, all in one batch; None: 3, or 1 for a question
    length: int | None = None  # tokens of a text, prompt included; None: as many as the model takes
    steps: int = 64  # denoising steps; more are slower and better, up to one per token
    temperature: float | None = None  # 0: the likeliest token; 1: the model's distribution; None: 0.7, or 0.1
    remasking: str = (
        "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    )
    threshold: float | None = None  # with confidence: keep every token above this probability; 0.9 is usual
    cfg_scale: float = 0.0  # classifier-free guidance towards the prompt; above 0, twice the work
    show: bool = False  # draw every step of the first text: hidden tokens dim, new tokens bright
    seed: int = 0  # of the random draws
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16

    def __post_init__(self):
        asks = self.question is not None
        if asks and self.prompt:
            raise ValueError("both a prompt and a question are set; leave one out")
        self.num_samples = (1 if asks else 3) if self.num_samples is None else self.num_samples
        self.temperature = (0.1 if asks else 0.7) if self.temperature is None else self.temperature
        if self.num_samples < 1 or self.seed < 0:
            raise ValueError(
                f"num_samples {self.num_samples} must be at least 1, seed {self.seed} at least 0"
            )

    def decoding(self):
        keys = ("steps", "temperature", "remasking", "threshold", "cfg_scale")
        return {key: getattr(self, key) for key in keys}


def load_trained(path, device):
    """(model, tokenizer, checkpoint) of a checkpoint. Raises ValueError if it has no tokenizer."""
    checkpoint = load_checkpoint(path)
    if not checkpoint["meta"]:
        raise ValueError(f"{path} has no tokenizer: it was trained without a prepared data set")
    return (
        MDM.from_checkpoint(checkpoint).to(device),
        load_tokenizer(checkpoint["meta"]["tokenizer"]),
        checkpoint,
    )


def encode_prompt(prompt, tokenizer, mask_id):
    """Token ids of a prompt, with mask_id for every token of its gaps."""
    ids = []
    for i, part in enumerate(re.split(r"\[MASK(?::(\d{1,6}))?\]", prompt.replace("[MASK]", "[MASK:1]"))):
        ids += [mask_id] * int(part) if i % 2 else tokenizer.encode(part, allowed_special="all")
    return ids


def watcher(start, tokenizer, mask_id):
    """on_step for generate: draws the first row, in place in a terminal, else as lines. ∎ is end-of-text."""
    before, step, in_place = start, 0, sys.stdout.isatty()

    def on_step(x):
        nonlocal before, step
        step, text = step + 1, ""
        for token, old in zip(x[0].tolist(), before):
            part = (
                "∎"
                if token == tokenizer.eot_token
                else "_"
                if token == mask_id
                else tokenizer.decode([token])
            )
            part = "".join(c if c.isprintable() or c == "\n" else "�" for c in part)
            style = (
                "\033[2m" if token == mask_id else "\033[1;32m" if token != old else ""
            )  # dim, bright green
            text += f"{style}{part}\033[0m" if in_place else part
        before = x[0].tolist()
        print(f"\033[H\033[Jstep {step}\n{text}" if in_place else f"step {step:>3}  {text!r}", flush=True)
        time.sleep(0.05 * in_place)  # slow enough to follow

    return on_step


def sample(cfg, model, tokenizer, meta):
    """Texts that continue the prompt or fill its gaps. A corpus of documents starts with end-of-text, as in training."""
    eot_id, mask_id = tokenizer.eot_token, model.config.mask_id
    opening = [eot_id] if meta["documents"] > 1 else []
    prompt = encode_prompt(cfg.prompt, tokenizer, mask_id)
    has_gaps, room = mask_id in prompt, model.config.block_size - len(opening)
    length = len(prompt) if has_gaps else cfg.length or room
    if not len(prompt) <= length <= room or length == len(prompt) and not has_gaps:
        what = f"the prompt has {len(prompt)} tokens, the text {length}; the model takes {room}"
        raise ValueError(f"{what}: shorten the prompt, or change --length")
    ids = opening + prompt + [mask_id] * (length - len(prompt))
    x, seeds = torch.tensor([ids] * cfg.num_samples), [seed_for(cfg.seed, i) for i in range(cfg.num_samples)]
    on_step = watcher(ids, tokenizer, mask_id) if cfg.show else None
    x, passes = generate(
        model, x, **cfg.decoding(), seeds=seeds, eot_id=None if has_gaps else eot_id, on_step=on_step
    )
    texts = []
    for row in x.tolist():
        written = row[len(opening) + len(prompt) :]  # nothing, if there are gaps
        end = written.index(eot_id) if eot_id in written else len(written)
        texts.append(tokenizer.decode(row[len(opening) :][: len(prompt) + end]) or "(empty)")
    return texts, passes


def ask(cfg, model, tokenizer):
    """Thoughts and answers to the question."""
    length = cfg.length or model.config.block_size
    on_step = watcher([model.config.mask_id] * length, tokenizer, model.config.mask_id) if cfg.show else None
    seeds = [seed_for(cfg.seed, i) for i in range(cfg.num_samples)]
    answers = answer(
        model, tokenizer, [cfg.question] * len(seeds), seeds, cfg.length, on_step, **cfg.decoding()
    )
    texts = []
    for thoughts, result, _ in answers:
        texts.append(
            "\n".join("(no room left)" if text is None else text or "(empty)" for text in (thoughts, result))
        )
    return texts, torch.tensor([passes for *_, passes in answers])


def main():
    cfg, _ = configurator.parse(SampleConfig)
    _, _, device = setup_distributed(cfg.device)
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, device)
    if cfg.question is not None and "epochs" not in checkpoint["run_config"]:
        print(
            "note: this model was not fine-tuned to answer questions; sft_gsm8k.py does that", file=sys.stderr
        )
    start = time.time()
    with autocast(device, cfg.dtype):
        if cfg.question is None:
            texts, passes = sample(cfg, model, tokenizer, checkpoint["meta"])
        else:
            texts, passes = ask(cfg, model, tokenizer)
    print("\n---\n".join(texts))
    seconds = time.time() - start
    print(
        f"{len(texts)} texts in {seconds:.2f} s, {passes.float().mean():.1f} forward passes each",
        file=sys.stderr,
    )


if __name__ == "__main__":
    configurator.run(main)
