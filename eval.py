"""Measures a trained model. Everything about it comes from its checkpoint.

    python eval.py --task=loss --out_dir=out/arithmetic                       # bound on -log p of the validation set
    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                  # answers the data set's test problems
    python eval.py --task=piqa.jsonl --out_dir=out/x --nll_type=chain_rule    # questions with choices, or targets
    torchrun --standalone --nproc_per_node=8 eval.py --task=gsm8k --out_dir=out/sft-gsm8k

A .jsonl file has one item a line, {"context": "...", "choices": ["...", "..."], "gold": 0} or {"context": "...",
"target": "..."}; a space joins the two texts. Results and settings are added to results.json beside the checkpoint.
Each item goes to a .jsonl file there at once, and the same command continues where it was interrupted.
"""

import glob
import hashlib
import json
import math
import os
import re
import zlib
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from model import guided_logits, sample_tokens, seed_for
from prepare_data import CORPORA, Source
from sample import load_trained
from sft_gsm8k import SFTConfig, answer, example_batches
from train import (
    TrainConfig,
    autocast,
    close_distributed,
    load_meta,
    lock,
    made_by,
    setup_distributed,
    token_batches,
    validate,
    write_file,
)


@dataclass
class EvalConfig:
    task: str = "loss"  # loss, gsm8k, or a .jsonl file
    out_dir: str = "out/arithmetic"  # the checkpoint: its folder (for ckpt.pt), or a file such as out/x/best.pt
    data: str | None = None  # loss: a prepared folder; gsm8k: file or URL of problems; None: those of training
    limit: int | None = None  # only the first so many items (validation sequences: evenly spread)
    batch_size: int = 64  # rows of a forward pass; changes results by rounding only
    # likelihood (file.jsonl)
    nll_type: str = "mc"  # mc: Monte Carlo, mc_num draws; chain_rule: left to right, a pass for each token
    mc_num: int = 32  # draws of the noise for each request, or validation sequence (the paper: 1024)
    mc_masking: str = "exact"  # exact: a draw hides an exact number of tokens; coins: each with probability t
    cfg_scale: float = 0.0  # w of classifier-free guidance towards context or question; above 0, twice the work
    # generation (gsm8k)
    steps: int = 256  # denoising steps of thoughts and of answer; a row needs no more than it has tokens
    length: int | None = None  # tokens of a row, question included; None: the model's block_size
    temperature: float = 0.1  # 0: the likeliest token
    remasking: str = "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    threshold: float | None = None  # with confidence: keep every token above this probability; 0.9 is usual
    seed: int = 0  # of the random draws, of which each item has its own
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16

    def __post_init__(self):
        for name in ("limit", "batch_size", "mc_num", "length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.nll_type not in ("mc", "chain_rule") or self.mc_masking not in ("exact", "coins"):
            got = f"{self.nll_type!r} and {self.mc_masking!r}"
            raise ValueError(f"wanted nll_type mc or chain_rule, and mc_masking exact or coins; got {got}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be at least 0")
        if self.task not in ("loss", "gsm8k") and not os.path.isfile(self.task):
            raise ValueError(f"task {self.task!r} is not loss, gsm8k or a .jsonl file that exists")

    def decoding(self):
        keys = ("steps", "temperature", "remasking", "threshold", "cfg_scale")
        return {key: getattr(self, key) for key in keys}


# ---------- Likelihood of a continuation given a context


def encode_pair(tokenizer, context, continuation, block_size):
    """Token ids of a context and of its continuation, as they stand in the joint text: the first token that reaches
    beyond the context is the continuation's. An empty context becomes end-of-text, as in training. A long context
    loses tokens on its left; the third result is their number. Raises ValueError for a too long continuation."""
    texts = [text.encode("utf-8", "replace").decode() for text in (context, continuation)]  # half surrogate pairs
    ids = tokenizer.encode_ordinary("".join(texts))
    ends = np.cumsum([len(piece) for piece in tokenizer.decode_tokens_bytes(ids)])
    n = int((ends <= len(texts[0].encode())).sum())
    context, target = ids[:n] or [tokenizer.eot_token], ids[n:]
    if len(target) > block_size:
        raise ValueError(f"a continuation of {len(target)} tokens exceeds block_size {block_size}; leave it out")
    n_cut = max(0, len(context) + len(target) - block_size)
    return context[n_cut:], target, n_cut


def draws(L, cfg, rng):
    """The forward passes of a request with L target tokens: which are hidden in each, (n, L) bool, and what each
    -log p weighs, (n, L). The sum of weight * -log p estimates -log p(target | context).

    chain_rule  pass j sees target[:j] and predicts token j: exact for the order from left to right
    mc          an estimate of the bound, with t = (u + i) / mc_num for draw i
      coins     each token is hidden with probability t, and weighs 1 / t
      exact     k = floor(t L) + 1 tokens are hidden, and weigh L / k: the coins' t integrated for each k. The tokens
                are dealt from one shuffled deck, so each is hidden equally often. Both lower the variance."""
    if cfg.nll_type == "chain_rule":
        return np.triu(np.ones((L, L), bool)), np.eye(L)
    t = (rng.random() + np.arange(cfg.mc_num)) / cfg.mc_num
    if cfg.mc_masking == "coins":
        hidden, weight = rng.random((cfg.mc_num, L)) < t[:, None], 1 / np.maximum(t, 1e-12)
    else:
        k = np.minimum(np.floor(t * L) + 1, L)
        dealt = np.cumsum(k) - k  # cards dealt before this draw, which takes the next k
        hidden, weight = (rng.permutation(L) - dealt[:, None]) % L < k[:, None], L / k
    hidden, number = np.unique(hidden, axis=0, return_inverse=True)  # equal passes are made once
    weight = np.bincount(number.ravel(), weight / cfg.mc_num)[:, None] * hidden
    return hidden[hidden.any(axis=1)], weight[hidden.any(axis=1)]


@torch.no_grad()
def nll_of(model, context, target, hidden, weight, cfg):
    """Sum of weight * -log p over the passes of one request, in nats. context, target: token ids; hidden, weight
    (n, L) of `draws`. With cfg_scale it ranks choices, but is no likelihood of the model."""
    n = len(context)
    x0 = torch.tensor(context + target)
    hidden, weight = (F.pad(torch.from_numpy(array), (n, 0)) for array in (hidden, weight))  # (n, n + L)
    total = 0.0
    for start in range(0, len(hidden), cfg.batch_size):
        rows = slice(start, start + cfg.batch_size)
        xt = torch.where(hidden[rows], model.config.mask_id, x0)
        given, scored = (torch.arange(len(x0)) < n).expand_as(xt), weight[rows] > 0
        targets, weights = x0.expand_as(xt)[scored], weight[rows][scored]
        with autocast(next(model.parameters()).device, cfg.dtype):
            for piece, logits in guided_logits(model, xt, scored, given, cfg.cfg_scale):
                nll = F.cross_entropy(logits, targets[piece].to(logits.device), reduction="none")
                total += (nll.cpu().double() * weights[piece]).sum().item()
    if not math.isfinite(total):
        raise ValueError(f"a -log p is {total}: the model is broken, or dtype too coarse; try --dtype=float32")
    return total


def log_likelihood(model, context, target, cfg):
    """log p(target | context) in nats, or an estimate of its bound. The draws follow from the seed and the tokens."""
    rng = np.random.default_rng([cfg.seed, zlib.crc32(np.array([*context, -1, *target]).tobytes())])
    return -nll_of(model, context, target, *draws(len(target), cfg, rng), cfg) if target else 0.0


@torch.no_grad()
def greedy_match(model, context, target, cfg):
    """Would greedy decoding write the target? It reveals one token a step, the surest one; the first wrong token
    ends it."""
    n, mask_id = len(context), model.config.mask_id
    x = torch.tensor([context + [mask_id] * len(target)])
    given = torch.arange(x.size(1))[None] < n
    for _ in target:
        hidden = x == mask_id
        with autocast(next(model.parameters()).device, cfg.dtype):
            pieces = [sample_tokens(logits, 0.0, None) for _, logits in guided_logits(model, x, hidden, given, cfg.cfg_scale)]
        tokens, confidence = (torch.cat(parts) for parts in zip(*pieces))
        at = hidden[0].nonzero()[confidence.argmax(), 0]
        x[0, at] = tokens[confidence.argmax()]
        if x[0, at] != target[at - n]:
            return False
    return True


# ---------- Tasks: a list of items, and a function that makes a record of each


def read_items(path):
    """Items of a .jsonl file, all with choices or all with a target. Raises ValueError for another line."""
    items, wanted = [], '{"context": text, "choices": [text, ...], "gold": number} or {"context": text, "target": text}'
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
                texts = [item["context"], *(item["choices"] if "choices" in item else [item["target"]])]
                fits = all(isinstance(text, str) for text in texts) and all(texts[1:])
                fits = fits and ("choices" not in item or item["gold"] in range(len(texts) - 1))
                fits = fits and ("choices" in item) == ("choices" in (items or [item])[0])
            except (ValueError, TypeError, KeyError):
                fits = False
            if not fits:
                raise ValueError(f"{path}, line {number}: wanted {wanted}, one kind in all lines; got {line.strip()[:80]!r}")
            items.append(item)
    if not items:
        raise ValueError(f"{path} is empty; wanted {wanted}")
    return items


def score_item(model, tokenizer, item, cfg):
    """Record of an item of a file: acc, and for choices acc_norm (log p over characters) and acc_bytes, all as
    lm-evaluation-harness defines them."""
    answers = item["choices"] if "choices" in item else [item["target"]]
    pairs = [encode_pair(tokenizer, item["context"], " " + text, model.config.block_size) for text in answers]
    log_p = [log_likelihood(model, context, target, cfg) for context, target, _ in pairs]
    record = {**item, "log_p": log_p, "cut": max(n_cut for *_, n_cut in pairs)}
    if "target" in item:
        return record | {"log_p": log_p[0], "acc": greedy_match(model, *pairs[0][:2], cfg)}
    sizes = {"acc": [1] * len(answers), "acc_norm": [len(text) for text in answers]}
    sizes["acc_bytes"] = [len(text.encode("utf-8", "replace")) for text in answers]
    for name, lengths in sizes.items():
        record[name] = int(np.argmax(np.array(log_p) / lengths)) == item["gold"]
    return record


def final_number(text):
    """The number behind the first '#### ' of a text as OpenAI's grader reads it, without commas; None if there is none."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    try:
        return Decimal(match[1].replace(",", "")) if match else None
    except InvalidOperation:  # such as 1.2.3
        return None


def read_problems(address, download_dir):
    """[(question, gold)] of a source of problems, gold a string. Lines that are none are left out, with a note."""
    source = Source(address, "problems", download_dir)
    texts = [text for text, _ in source]  # question, thoughts, answer, question, ...
    problems = [(q.removeprefix("Question: "), final_number(a)) for q, a in zip(texts[::3], texts[2::3])]
    source.report_malformed()
    numeric = [(question, str(gold)) for question, gold in problems if gold is not None]
    if len(numeric) < len(problems):
        print(f"{address}: left out {len(problems) - len(numeric):,} problems whose answer is no number")
    if not numeric:
        raise ValueError(f"{address} holds no problems; wanted question||thoughts #### answer, or OpenAI's .jsonl")
    return numeric


def answer_problems(model, tokenizer, indices, problems, cfg):
    """Records of problems (question, gold). Text follows from problem and index, whatever else is in the batch."""
    questions, golds = zip(*problems)
    seeds = [seed_for(cfg.seed, index) for index in indices]
    with autocast(next(model.parameters()).device, cfg.dtype):
        answers = answer(model, tokenizer, questions, seeds, cfg.length, **cfg.decoding())
    records = []
    for question, gold, (thoughts, text, passes) in zip(questions, golds, answers):
        record = {"question": question, "thoughts": thoughts, "answer": text, "gold": gold, "forward_passes": passes}
        records.append(record | {"acc": final_number(text or "") == Decimal(gold)})
    return records


def measure(name, items, work, cfg, rank, world_size):
    """Records of all items, in order: work(indices, items) makes those of a batch; each process takes every
    world_size-th item. Each record goes to a file of its process at once: an interrupted evaluation continues."""
    files, done = os.path.join(folder_of(cfg), name), {}
    for path in glob.glob(glob.escape(files) + ".*.jsonl"):
        with open(path, encoding="utf-8") as file:
            records = [json.loads(line) for line in file if line.endswith("\n")]  # the last may be cut off
        done |= {record["index"]: record for record in records}
    if world_size > 1:
        dist.barrier()  # all have read before one writes
    todo = [i for i in range(len(items)) if i not in done][rank::world_size]
    size = cfg.batch_size if cfg.task == "gsm8k" else 1
    bar = tqdm(total=len(todo), desc=cfg.task, unit="item", disable=rank > 0)
    with open(f"{files}.{rank}.jsonl", "a", encoding="utf-8") as file, bar:
        for start in range(0, len(todo), size):
            indices = todo[start : start + size]
            for index, record in zip(indices, work(indices, [items[i] for i in indices])):
                done[index] = {"index": index, **record}
                file.write(json.dumps(done[index]) + "\n")
            file.flush()
            bar.update(len(indices))
            bar.set_postfix_str(f"acc {np.mean([record['acc'] for record in done.values()]):.3f}")
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, done)
        done = {index: record for part in parts for index, record in part.items()}
    return [done[i] for i in range(len(items))]


def folder_of(cfg):
    """Where results go: beside the checkpoint."""
    return cfg.out_dir if os.path.isdir(cfg.out_dir) else os.path.dirname(cfg.out_dir)


def identity_of(cfg, checkpoint, data):
    """What a result depends on: settings, data, weights and our own code; and what made it."""
    digest = hashlib.sha256(json.dumps(data).encode())
    for tensor in checkpoint["model"].values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    for name in ("model.py", "train.py", "sft_gsm8k.py", "eval.py", "prepare_data.py"):
        with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "rb") as file:
            digest.update(file.read())
    settings = {key: value for key, value in asdict(cfg).items() if key not in ("batch_size", "device")}
    return {"settings": settings, "sha256": digest.hexdigest(), **made_by()}


def means(records, names):
    """{name: mean, name_se: its standard error} over the records."""
    result = {}
    for name in names:
        values = np.array([record[name] for record in records], float)
        result[name] = float(values.mean())
        result[f"{name}_se"] = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return result


# ---------- --task=loss


def validation(run, data, tokenizer, limit):
    """(get_batch, sequences, meta) of the validation set that a run had, or of another prepared folder: as many
    sequences as the tokens fill, or all examples of fine-tuning; limit of them, evenly spread."""
    folder = data or os.path.join(run["data_dir"], run["dataset"])
    meta = load_meta(folder)
    if meta["tokenizer"]["name"] != tokenizer.name or meta["vocab_size"] != tokenizer.n_vocab:
        raise ValueError(f"{folder} has another vocabulary than the checkpoint; prepare it with the same tokenizer")
    if "epochs" in run:  # a model of sft_gsm8k.py
        run_cfg = SFTConfig(**run)
        get_batch, examples = example_batches(folder, meta, run_cfg)
        n = len(examples["val"][1])
    else:
        run_cfg = TrainConfig(**run)
        get_batch, n = token_batches(folder, meta, run_cfg), meta["tokens"]["val"] // run_cfg.block_size
    run_cfg.eval_seqs = max(2, min(n, limit or n))
    return get_batch, run_cfg.eval_seqs, meta


def measure_loss(cfg, model, tokenizer, checkpoint, rank, world_size):
    """The bound on -log p of the validation set, in nats per token and in bits per byte of text."""
    run = checkpoint["run_config"]
    get_batch, n, meta = validation(run, cfg.data, tokenizer, cfg.limit)
    B = run["micro_batch_size"]
    nats, se, _, tokens = validate(model, get_batch, B, n, cfg.dtype, cfg.mc_num, rank, world_size)
    sizes = [0 if i == tokenizer.eot_token else len(tokenizer.decode_bytes([i])) for i in range(tokenizer.n_vocab)]
    batches = [get_batch("val", index) for index in range(math.ceil(n / B))]
    x0, maskable = (torch.cat(tensors)[:n] for tensors in zip(*batches))
    bits = tokens.sum().item() / torch.tensor(sizes)[x0[maskable]].sum().item() / math.log(2)
    result = {"nats_per_token": nats, "nats_per_token_se": se, "perplexity_bound": math.exp(nats)}
    return {"n": n, **result, "bits_per_byte": nats * bits, "bits_per_byte_se": se * bits}, meta["sha256"]["val"]


# ---------- All tasks


def main():
    cfg, set_by = configurator.parse(EvalConfig)
    rank, world_size, device = setup_distributed(cfg.device)
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, device)
    locked = lock(folder_of(cfg), ".eval.lock") if rank == 0 else None  # noqa: F841
    options = (cfg, rank, world_size)
    if rank == 0:
        print(configurator.describe(cfg, set_by))
    if cfg.task == "loss":
        result, data = measure_loss(cfg, model, tokenizer, checkpoint, rank, world_size)
        identity = identity_of(cfg, checkpoint, data)
        name = f"loss-{identity['sha256'][:8]}"
    elif cfg.task == "gsm8k":
        corpus, data_dir = checkpoint["meta"]["name"], checkpoint["run_config"]["data_dir"]
        folder = os.path.join(data_dir, corpus)
        address = cfg.data or CORPORA[corpus].test_source or os.path.join(folder, "test.txt")
        problems = read_problems(address, os.path.join(folder, "download"))[: cfg.limit]
        identity = identity_of(cfg, checkpoint, problems)
        name = f"gsm8k-{identity['sha256'][:8]}"
        work = lambda indices, batch: answer_problems(model, tokenizer, indices, batch, cfg)  # noqa: E731
        records = measure(name, problems, work, *options)
        wrong = [record for record in records if not record["acc"]]
        result = {
            "n": len(records), **means(records, ["acc", "forward_passes"]), "wrong": len(wrong),
            "wrong_empty": sum(not record["answer"] for record in wrong), "data": address,
        }  # fmt: skip
    else:
        items = read_items(cfg.task)[: cfg.limit]
        identity = identity_of(cfg, checkpoint, items)
        name = f"{os.path.splitext(os.path.basename(cfg.task))[0]}-{identity['sha256'][:8]}"
        work = lambda indices, batch: [score_item(model, tokenizer, item, cfg) for item in batch]  # noqa: E731
        records = measure(name, items, work, *options)
        names = ["acc", "acc_norm", "acc_bytes"] if "choices" in items[0] else ["acc", "log_p"]
        result = {"n": len(records), **means(records, names), "contexts_cut": sum(r["cut"] > 0 for r in records)}
    if rank == 0:
        path = os.path.join(folder_of(cfg), "results.json")
        results = json.load(open(path)) if os.path.exists(path) else {}
        results[name] = {**result, "step": checkpoint["step"], "processes": world_size, **identity}
        write_file(path, lambda file: file.write(json.dumps(results, indent=1).encode()))
        print(f"{name}, {cfg.out_dir}, step {checkpoint['step']:,}")
        for key, value in result.items():
            error = result.get(f"{key}_se")
            if not key.endswith("_se"):
                value = f"{value:.4f}" if isinstance(value, float) else value
                print(f"  {key:<16} {value}" + (f" ± {error:.4f}" if error is not None else ""))
        print(f"added to {path}")
    close_distributed()


if __name__ == "__main__":
    configurator.run(main)
