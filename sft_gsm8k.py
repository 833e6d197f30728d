"""Fine-tunes a masked diffusion model on GSM8K, or on the built-in word problems, in the paper's two-stage form.

    python sft_gsm8k.py config/sft_arithmetic.py                                # the built-in problems, on a CPU in minutes
    torchrun --standalone --nproc_per_node=8 sft_gsm8k.py config/sft_gsm8k.py   # the paper's recipe
    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                    # the accuracy it reaches

A problem makes two examples. Each has a prompt, left of the bar, and a response, which the model learns to write:

    Question: Tom has 3 apples ... | Answer: <<3+4=7>> <<7*2=14>> <eot> <eot> ...           question -> thoughts
    Question: Tom has 3 apples ... Answer: <<3+4=7>> <<7*2=14>> | #### 14 <eot> <eot> ...   question, thoughts -> answer

The prompt is never hidden and is no part of the loss. All of the response may be, end-of-text up to block_size included: from
that filling the model learns where to stop. `solve` asks a trained model in the same two stages, token id for token id.
"""

import dataclasses
import functools
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

import configurator
from model import generate
from train import (
    TrainConfig,
    close_distributed,
    load_meta,
    seed_for,
    settle,
    setup_distributed,
    start_model,
    train,
    watch,
)


@dataclass
class SFTConfig(TrainConfig):
    dataset: str = "gsm8k"  # problems: gsm8k or arithmetic, made by prepare_data.py
    out_dir: str | None = None  # checkpoints and log.jsonl go here; None: out/sft-dataset
    epochs: float | None = 10.0  # passes over the training examples; instead of it: max_steps or train_flops
    max_steps: int | None = None  # optimizer steps
    block_size: int = 256  # tokens of an example, filling included; longer examples are left out
    batch_size: int = 256  # examples per optimizer step, over all processes
    learning_rate: float = 2e-4  # peak, after warm-up
    min_lr: float = 2e-5  # at the end of the cosine

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/sft-{self.dataset}"
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it must be a number above 0")
        if self.align_documents is not None:
            raise ValueError("align_documents is for pretraining; an example always starts with its question")
        super().__post_init__()


# ---------------------------------------------------------------------------------------------------------------------
# Examples


def load_examples(folder, meta, split, block_size):
    """Tokens of a split, and its examples (n, 3): where in them the prompt begins, the response begins, and the response ends.
    The third result counts the examples that are left out because they do not fit into block_size with an end-of-text.

    Raises ValueError if the data set holds no problems, or if its files do not agree."""
    path = os.path.join(folder, f"{split}_cuts.npy")
    if not os.path.exists(path):
        raise ValueError(
            f"{path} not found: fine-tuning takes problems; prepare them with prepare_data.py gsm8k or arithmetic"
        )
    tokens = np.memmap(os.path.join(folder, f"{split}.bin"), meta["dtype"], mode="r")
    try:
        cuts = np.load(path)  # (problems, 4)
        agree = (tokens[cuts[:, 3] - 1] == meta["eot_id"]).all() and tokens.max() < meta["vocab_size"]
        agree = agree and cuts[:, 0].min() >= 0 and (np.diff(cuts) > 0).all()
    except (
        ValueError,
        EOFError,
        IndexError,
        TypeError,
    ):  # cut off, another kind of file, or places that the tokens do not have
        agree = False
    if not agree:
        raise ValueError(f"{path} and {split}.bin do not belong together; prepare the data set again")
    question, thoughts, answer, eot = cuts[:, 0], cuts[:, 1], cuts[:, 2], cuts[:, 3] - 1
    to_thoughts, to_answer = (
        np.stack((question, thoughts, answer), axis=1),
        np.stack((question, answer, eot), axis=1),
    )
    examples = np.concatenate((to_thoughts, to_answer))
    fits = examples[:, 2] - examples[:, 0] < block_size
    if not fits.any():
        raise ValueError(
            f"none of the {len(examples):,} examples of {path} fits into block_size {block_size}; raise it"
        )
    return tokens, examples[fits], int((~fits).sum())


def example_batches(folder, meta, cfg):
    """get_batch for fine-tuning, and what load_examples gives for 'train' and 'val'.

    Training goes through shuffled epochs: place p of the run's stream of examples is number p mod n of epoch p // n, in an order
    drawn from (seed, epoch). So each example comes once an epoch, whatever the number of processes. Validation takes eval_seqs
    examples, evenly spread over those of the first stage and then those of the second."""
    B, T = cfg.micro_batch_size, cfg.block_size
    data = {split: load_examples(folder, meta, split, T) for split in ("train", "val")}
    checks = {split: watch(os.path.join(folder, f"{split}.bin"), meta["sha256"][split]) for split in data}

    @functools.lru_cache(maxsize=2)  # a batch may reach over the end of an epoch
    def order(epoch):
        return np.random.default_rng([cfg.seed, epoch]).permutation(len(data["train"][1]))

    def get_batch(split, index):
        checks[split]()
        tokens, examples, _ = data[split]
        places = np.arange(index * B, (index + 1) * B)
        if split == "train":
            chosen = [order(place // len(examples))[place % len(examples)] for place in places.tolist()]
        else:
            chosen = places * len(examples) // cfg.eval_seqs % len(examples)
        x0 = torch.full((B, T), meta["eot_id"])
        maskable = torch.ones(B, T, dtype=torch.bool)
        for row, (start, response, end) in enumerate(examples[chosen]):
            x0[row, : end - start] = torch.from_numpy(tokens[start:end].astype(np.int64))
            maskable[row, : response - start] = False
        return x0, maskable

    return get_batch, data


# ---------------------------------------------------------------------------------------------------------------------
# Asking a trained model


def respond(
    model,
    prompts,
    eot_id,
    seeds,
    steps=256,
    length=None,
    remasking="confidence",
    cfg_scale=0.0,
    on_step=None,
    **options,
):
    """Writes a response behind each prompt (a list of token ids, or None), all in one batch of rows of `length` tokens, prompt
    included (default: the model's block_size). Prompts of different length need no padding: what is left of a row is response.
    options: what else generate takes.

    Returns for each prompt the response's ids up to its end-of-text, None where there is no prompt or no room behind it; and the
    number of forward passes that its row took."""
    length, mask_id = length or model.config.block_size, model.config.mask_id
    fitting = [i for i, prompt in enumerate(prompts) if prompt is not None and len(prompt) < length]
    responses, passes = [None] * len(prompts), [0] * len(prompts)
    if not fitting:
        return responses, passes
    x = torch.full((len(fitting), length), mask_id)
    for row, i in enumerate(fitting):
        x[row, : len(prompts[i])] = torch.tensor(prompts[i])
    counts, before = torch.zeros(len(fitting), dtype=torch.long), x

    def watch(x):
        nonlocal counts, before
        now = x.cpu()  # by chance a step at random reveals nothing; by confidence, a row that stays as it is was not computed
        taken = before == mask_id if remasking == "random" else now != before
        counts, before = counts + taken.any(dim=1) * (1 if cfg_scale == 0.0 else 2), now
        if on_step:
            on_step(x)

    filled, _ = generate(
        model, x.to(model.device), steps, remasking=remasking, cfg_scale=cfg_scale, seeds=[seeds[i] for i in fitting],
        eot_id=eot_id, on_step=watch, **options,
    )  # fmt: skip
    for i, ids, count in zip(fitting, filled.tolist(), counts.tolist()):
        ids = ids[len(prompts[i]) :]
        responses[i] = ids[: ids.index(eot_id)] if eot_id in ids else ids
        passes[i] = count
    return responses, passes


def solve(model, tokenizer, questions, seeds, for_thoughts=None, for_answer=None, on_step=None):
    """Answers questions in two stages: thoughts from the question, then the answer from question and thoughts. The second prompt
    is the first one with the token ids that the model wrote, as in training; nothing is decoded and encoded anew.

    for_thoughts, for_answer    options of respond for either stage
    Returns for each question (thoughts, answer, number of forward passes); a text is None where there was no room for it."""
    prompts = [tokenizer.encode_ordinary(f"Question: {question.strip()}") for question in questions]
    texts, passes = [], np.zeros(len(questions), dtype=int)
    for stage, options in enumerate((for_thoughts or {}, for_answer or {})):
        stage_seeds = [seed_for(seed, stage) for seed in seeds]
        responses, stage_passes = respond(
            model, prompts, tokenizer.eot_token, stage_seeds, on_step=on_step, **options
        )
        texts.append([None if ids is None else tokenizer.decode(ids).strip() for ids in responses])
        prompts = [None if ids is None else prompt + ids for prompt, ids in zip(prompts, responses)]
        passes += np.array(stage_passes, dtype=int)
    return list(zip(*texts, passes.tolist()))


def main():
    cfg, set_by = configurator.parse(SFTConfig)
    cfg, checkpoint = settle(cfg, set_by)
    rank, _, _ = setup_distributed(cfg.device)
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    meta = load_meta(folder)
    get_batch, data = example_batches(folder, meta, cfg)
    if cfg.epochs is not None:
        n = len(data["train"][1])
        cfg = dataclasses.replace(cfg, max_steps=int(cfg.epochs * n / cfg.batch_size))
        if cfg.max_steps == 0:
            raise ValueError(
                f"{cfg.epochs} epochs of {n:,} examples are less than one batch of {cfg.batch_size}; raise epochs"
            )
    if rank == 0:
        print(configurator.describe(cfg, set_by))
        for split, (_, examples, too_long) in data.items():
            print(
                f"{split}: {len(examples):,} examples, and {too_long:,} left out: longer than {cfg.block_size} tokens"
            )
    model = start_model(cfg, checkpoint, meta)
    train(cfg, model, get_batch, meta, checkpoint if cfg.init_from == "resume" else None)
    close_distributed()


if __name__ == "__main__":
    configurator.run(main)
