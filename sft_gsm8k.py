"""Fine-tunes a masked diffusion model on GSM8K, or on the built-in word problems, in the paper's two stages.

    python sft_gsm8k.py config/sft_arithmetic.py                                # built-in problems, on a CPU
    torchrun --standalone --nproc_per_node=8 sft_gsm8k.py config/sft_gsm8k.py   # the paper's recipe
    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                    # the accuracy it reaches

A problem makes two examples. Each has a prompt, left of the bar, and a response, which the model learns:

    Question: Tom has 3 apples ... | Answer: <<3+4=7>> <<7*2=14>> <eot> <eot> ...         question -> thoughts
    Question: Tom has 3 apples ... Answer: <<3+4=7>> <<7*2=14>> | #### 14 <eot> <eot> ...   both -> the answer

The prompt is never hidden and no part of the loss. All of the response may be hidden, with the end-of-text
that fills it up to block_size: so the model learns to stop. `answer` asks a model in the same two stages.
"""

import functools
import os
from dataclasses import dataclass

import numpy as np
import torch

import configurator
from model import generate, seed_for
from train import TrainConfig, setup_distributed, start_run, train


@dataclass
class SFTConfig(TrainConfig):
    dataset: str = "gsm8k"  # problems: gsm8k or arithmetic, made by prepare_data.py
    out_dir: str | None = None  # checkpoints and log.jsonl go here; None: out/sft-dataset
    init_from: str | None = None  # checkpoint of a pretrained model, resume (from out_dir), or scratch
    epochs: float = 10.0  # passes over the examples; max_steps, not this, makes a resumed run longer
    max_steps: int | None = None  # optimizer steps; None: as many as epochs take. train_flops goes before it
    block_size: int = 256  # tokens of an example, filling included; longer examples are left out
    batch_size: int = 256  # examples per optimizer step, over all processes
    learning_rate: float = 2e-4  # peak, after warm-up

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/sft-{self.dataset}"
        if self.init_from in (None, "auto"):
            raise ValueError("set --init_from=out/NAME, the model to fine-tune, or --init_from=scratch")
        super().__post_init__()


def is_fine_tuned(checkpoint):
    return "epochs" in checkpoint["run_config"]  # a setting of this script alone


def load_examples(folder, meta, split, block_size):
    """Tokens of a split; its examples (n, 4): the stage, 0 or 1, where prompt and response begin, and where
    the response ends; how many are left out, because they do not fit into block_size with an end-of-text.
    Raises ValueError if the data set holds no problems, or a stage has no example that fits."""
    path = os.path.join(folder, f"{split}_cuts.npy")
    if not meta["one_per_line"]:
        raise ValueError(f"{folder} holds no problems; run: python prepare_data.py gsm8k (or arithmetic)")
    tokens = np.memmap(os.path.join(folder, f"{split}.bin"), meta["dtype"], mode="r")
    question, thoughts, answer, end = np.load(path).T  # (problems,) each: where they begin, and the end
    zero = np.zeros_like(end)
    to_thoughts, to_answer = [zero, question, thoughts, answer], [zero + 1, question, answer, end - 1]
    examples = np.concatenate((to_thoughts, to_answer), axis=1).T
    fits = examples[:, 3] - examples[:, 1] < block_size
    if len(np.unique(examples[fits, 0])) < 2:
        raise ValueError(f"no example of a stage of {path} fits into block_size {block_size}; raise it")
    return tokens, examples[fits], int((~fits).sum())


def example_batches(examples, meta, cfg):
    """get_batch for fine-tuning on examples, {split: what load_examples returns}. Training takes them in an
    order drawn from (seed, epoch), each once an epoch for any number of processes. Validation takes eval_seqs
    examples: half of them spread evenly over the first stage, then the others over the second; or all.
    The loss of a micro-batch is per response token of its own, as the authors' is: a small one is noisier."""
    B, T = cfg.micro_batch_size, cfg.block_size
    stages = examples["val"][1][:, 0]
    validated = np.arange(len(stages))
    if cfg.eval_seqs != len(stages):
        half = (cfg.eval_seqs + 1) // 2
        first, second = np.flatnonzero(stages == 0), np.flatnonzero(stages == 1)
        second = second[np.arange(cfg.eval_seqs - half) * len(second) // half]
        validated = np.concatenate((first[np.arange(half) * len(first) // half], second))

    @functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
    def order(epoch):
        return np.random.default_rng([cfg.seed, epoch]).permutation(len(examples["train"][1]))

    def get_batch(split, index):
        tokens, rows, _ = examples[split]
        n = len(rows) if split == "train" else len(validated)
        x0, maskable = torch.full((B, T), meta["eot_id"]), torch.ones(B, T, dtype=torch.bool)
        for row, i in enumerate(range(index * B, (index + 1) * B)):
            chosen = order(i // n)[i % n] if split == "train" else validated[i % n]
            _, start, response, end = rows[chosen]
            x0[row, : end - start] = torch.from_numpy(tokens[start:end].astype(np.int64))
            maskable[row, : response - start] = False
        return x0, maskable

    return get_batch


def respond(model, tokenizer, prompts, seeds, length, **options):
    """Continues prompts, lists of token ids, up to an end-of-text, in rows of length tokens. Each has a seed.
    Returns (token ids, text, forward passes) for each; the text is None if the prompt leaves no room."""
    responses, eot_id = [([], None, 0)] * len(prompts), tokenizer.eot_token
    fit = [i for i, prompt in enumerate(prompts) if len(prompt) < length]
    rows = [prompts[i] + [model.config.mask_id] * (length - len(prompts[i])) for i in fit]
    x = torch.tensor(rows, dtype=torch.long).view(len(fit), length)
    x, passes = generate(model, x, seeds=[seeds[i] for i in fit], eot_id=eot_id, **options)
    for i, ids, n in zip(fit, x.tolist(), passes.tolist()):
        ids = ids[len(prompts[i]) :] + [eot_id]
        ids = ids[: ids.index(eot_id)]
        responses[i] = ids, tokenizer.decode(ids).strip(), n
    return responses


def answer(model, tokenizer, questions, seeds, length=None, **options):
    """Answers questions in two stages: thoughts from the question, the answer from both. The second prompt is
    the first with the token ids that the model wrote, as in training. Each question has a seed, an integer.
    length is that of a row, prompt included; None: the model's block_size. options go to generate. Returns
    (thoughts, answer, forward passes) for each question; a text is None if the prompt leaves no room."""
    length = length or model.config.block_size
    prompts = [tokenizer.encode_ordinary(f"Question: {question.strip()}") for question in questions]
    first = respond(model, tokenizer, prompts, [seed_for(seed, 0) for seed in seeds], length, **options)
    prompts = [prompt + ids for prompt, (ids, _, _) in zip(prompts, first)]
    second = respond(model, tokenizer, prompts, [seed_for(seed, 1) for seed in seeds], length, **options)
    return [(thoughts, text, n + m) for (_, thoughts, n), (_, text, m) in zip(first, second)]


def main():
    cfg, set_by = configurator.parse(SFTConfig)
    cfg, meta, model, resume = start_run(cfg, set_by)
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    examples = {split: load_examples(folder, meta, split, cfg.block_size) for split in ("train", "val")}
    if cfg.max_steps is None:
        cfg.max_steps = int(cfg.epochs * len(examples["train"][1]) / cfg.batch_size)
    if setup_distributed(cfg.device)[0] == 0:  # the rank
        for split, (_, kept, too_long) in examples.items():
            print(f"{split}: {len(kept):,} examples; {too_long:,} left out, longer than block_size")
    train(cfg, model, example_batches(examples, meta, cfg), meta, resume)


if __name__ == "__main__":
    configurator.run(main)
