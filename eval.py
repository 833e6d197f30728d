"""Measures a trained model.

    python eval.py --task=loss --out_dir=out/arithmetic                      # bound of the validation set
    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                 # answers the test problems
    python eval.py --task=piqa.jsonl --out_dir=out/x --nll_type=chain_rule   # choices, or targets

A line of a .jsonl file is {"context": ..., "choices": [...], "gold": 0} or {"context": ..., "target": ...}.
Results go to results.json beside the checkpoint; the same command continues an interrupted evaluation."""

import contextlib
import glob
import json
import math
import os
import re
import zlib
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import configurator
import train
from model import generate, guided_logits, seed_for
from prepare_data import Documents, file_sha256, find_files, is_remote, load_meta, read_json, read_rows
from sample import load_trained
from sft_gsm8k import answer, example_batches, is_fine_tuned, load_examples


@dataclass
class EvalConfig:
    task: str = "loss"  # loss, gsm8k, or a .jsonl file
    out_dir: str = "out/arithmetic"  # the checkpoint: its folder (for ckpt.pt), or a file like out/x/best.pt
    results: str | None = None  # folder for results.json and records; None: that of the checkpoint
    data: str | None = None  # loss: a prepared folder; gsm8k: a file or URL of problems; None: as in training
    limit: int | None = None  # only the first so many items (loss: sequences, evenly spread)
    batch_size: int = 64  # rows of a forward pass
    nll_type: str = "mc"  # likelihood. mc: Monte Carlo, mc_num draws; chain_rule: a pass for each token
    delimiter: str = " "  # likelihood: between context and text, unless white space is there already
    mc_num: int = 32  # draws of the noise for each text, also of loss (the paper: 1024)
    mc_masking: str = "exact"  # exact: a draw hides an exact number of tokens; coins: each with probability t
    cfg_scale: float = 0.0  # classifier-free guidance towards context or question; above 0, twice the work
    steps: int = 256  # gsm8k, as the next four keys: denoising steps of the thoughts and of the answer
    length: int | None = None  # tokens of a row, question included; None: the model's block_size
    temperature: float = 0.1  # 0: the likeliest token
    remasking: str = "confidence"  # confidence: keep the surest tokens first; random: the reverse process
    threshold: float | None = None  # with confidence: keep every token above this probability; 0.9 is usual
    seed: int = 0  # of the random draws, of which each item has its own
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16

    def __post_init__(self):
        counts = self.limit, self.batch_size, self.mc_num, self.length
        if not all(count is None or count >= 1 for count in counts):
            raise ValueError("wanted limit, batch_size, mc_num and length of at least 1")
        if self.nll_type not in ("mc", "chain_rule") or self.mc_masking not in ("exact", "coins"):
            raise ValueError("wanted nll_type mc or chain_rule, and mc_masking exact or coins")
        if self.task not in ("loss", "gsm8k") and not os.path.isfile(self.task):
            raise ValueError(f"task {self.task!r} is neither loss nor gsm8k nor an existing .jsonl file")


def draws(L, cfg, rng):
    """The forward passes of a request with L target tokens: which are hidden, (passes, L) bool, and the
    weight of each -log p, (passes, L). The weighted sum over all estimates -log p(target | context).
    chain_rule  pass j sees target[:j] and predicts token j: exact for the order from left to right
    mc, coins   t = (u + i) / mc_num in draw i; a token is hidden with probability t and weighs 1 / t
    mc, exact   k = floor(t L) + 1 are hidden, the least hidden so far, and weigh L / k: less variance"""
    if cfg.nll_type == "chain_rule":
        return np.triu(np.ones((L, L), bool)), np.eye(L)
    t = (rng.random() + np.arange(cfg.mc_num)) / cfg.mc_num
    if cfg.mc_masking == "coins":
        hidden, weight = rng.random((cfg.mc_num, L)) < t[:, None], 1 / t
    else:
        hidden, times = np.zeros((cfg.mc_num, L), bool), np.zeros(L)  # how often a token was hidden
        for row, k in zip(hidden, np.floor(t * L).astype(int) + 1):
            row[np.argsort(times + rng.random(L))[:k]] = True
            times += row
        weight = L / hidden.sum(axis=1)
    # equal draws are one pass, with the sum of their weights
    hidden, pass_of_draw = np.unique(hidden, axis=0, return_inverse=True)
    return hidden, np.bincount(pass_of_draw.ravel(), weight / cfg.mc_num)[:, None] * hidden


def encode_pair(tokenizer, context, continuation, block_size):
    """Token ids of context and continuation as they stand in the joint text: a token that reaches beyond the
    context is the continuation's. An empty context becomes end-of-text; a long one loses tokens on its left,
    and their number is the third result. Raises ValueError for a too long continuation."""
    ids = tokenizer.encode_ordinary(context + continuation)
    n = len(os.path.commonprefix([ids, tokenizer.encode_ordinary(context)]))
    context, target = ids[:n] or [tokenizer.eot_token], ids[n:]
    n_cut = max(0, len(context) + len(target) - block_size)
    if n_cut > len(context):
        raise ValueError(f"a continuation of {len(target)} tokens exceeds block_size {block_size}")
    return context[n_cut:], target, n_cut


@torch.no_grad()
def nll_of(model, context, target, hidden, weight, cfg):
    """Sum of weight * -log p over the passes of `draws`, in nats. With guidance this is no likelihood."""
    n, x0, total = len(context), torch.tensor(context + target), 0.0
    hidden, weight = (F.pad(torch.from_numpy(array), (n, 0)) for array in (hidden, weight))  # (passes, n + L)
    for rows in torch.arange(len(hidden)).split(cfg.batch_size):
        xt, scored = torch.where(hidden[rows], model.config.mask_id, x0), weight[rows] > 0
        targets, weights = x0.expand_as(xt)[scored], weight[rows][scored]
        with train.autocast(next(model.parameters()).device, cfg.dtype):
            for piece, logits in guided_logits(model, xt, scored, torch.arange(len(x0)) < n, cfg.cfg_scale):
                nll = F.cross_entropy(logits, targets[piece].to(logits.device), reduction="none")
                total += (nll.cpu().double() * weights[piece]).sum().item()
    return total


def log_likelihood(model, context, target, cfg):
    """log p(target | context) in nats, or its bound. The draws follow from the seed and the tokens."""
    rng = np.random.default_rng([cfg.seed, zlib.crc32(np.array([*context, -1, *target]).tobytes())])
    return -nll_of(model, context, target, *draws(len(target), cfg, rng), cfg) if target else 0.0


def greedy_match(model, context, target, cfg):
    """Whether greedy decoding, which writes the surest token in each step, would write the target."""
    x0, mask_id = torch.tensor([context + target]), model.config.mask_id

    def stop_if_wrong(x):
        if ((x != x0) & (x != mask_id)).any():
            raise StopIteration

    x = torch.where(torch.arange(x0.size(1)) < len(context), x0, mask_id)
    with train.autocast(next(model.parameters()).device, cfg.dtype), contextlib.suppress(StopIteration):
        generate(model, x, max(1, len(target)), cfg_scale=cfg.cfg_scale, on_step=stop_if_wrong)
        return True
    return False


def encode_item(tokenizer, item, delimiter, block_size):
    """encode_pair of the context and each choice, or the target. The delimiter comes between them, unless the
    context ends in white space or the text begins with it. Blanks at the end of the context go with the text,
    as in lm-eval: a blank and a word are one token."""
    context, pairs = item["context"].rstrip(" "), []
    blanks = item["context"][len(context) :]
    for text in item["choices"] if "choices" in item else [item["target"]]:
        has_space = item["context"][-1:].isspace() or text[0].isspace()
        pairs.append(encode_pair(tokenizer, context, (blanks if has_space else delimiter) + text, block_size))
    return pairs


def read_items(path):
    """Items of a .jsonl file, all with choices or all with a target. Raises ValueError for another line."""
    items, wanted = [], '{"context": ..., "choices": [...], "gold": 0} or {"context": ..., "target": ...}'
    for line, position in read_rows(path):
        try:
            items.append(item := json.loads(line))
            has_choices = "choices" in items[0]
            texts = item["choices"] if has_choices else [item["target"]]
            "".join([item["context"], *texts])  # fails unless all of them are texts
            fits = isinstance(texts, list) and all(texts)
            fits = fits and (not has_choices or item["gold"] in range(len(texts)))
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise ValueError(f"{position}: wanted {wanted}; got {str(line)[:80]!r}")
    if not items:
        raise ValueError(f"{path} is empty; wanted {wanted}")
    return items


def score_item(model, tokenizer, item, cfg):
    """The item with log_p, acc, and for choices acc_norm (log p per character) and acc_bytes, as lm-eval.
    Fields of the item with these names are replaced."""
    pairs = encode_item(tokenizer, item, cfg.delimiter, model.config.block_size)
    log_p = np.array([log_likelihood(model, context, target, cfg) for context, target, _ in pairs])
    record = {**item, "log_p": log_p.tolist(), "cut": max(n_cut for *_, n_cut in pairs)}
    if "choices" not in item:
        return record | {"log_p": log_p[0], "acc": greedy_match(model, *pairs[0][:2], cfg)}
    texts = [text.lstrip(" ") or text for text in item["choices"]]  # however the blank is spelled
    lengths = [len(text) for text in texts], [len(text.encode()) for text in texts]
    scores = {"acc": log_p, "acc_norm": log_p / lengths[0], "acc_bytes": log_p / lengths[1]}
    return record | {name: int(score.argmax()) == item["gold"] for name, score in scores.items()}


def final_number(text):
    """The number behind the first '#### ', as OpenAI's grader reads it, without commas; or None."""
    match = re.search(r"#### (-?[0-9.,]+)", text or "")
    try:
        return Decimal(match[1].replace(",", "")) if match else None
    except InvalidOperation:  # such as 1.2.3
        return None


def read_problems(address, download_dir=None):
    """[(question, gold)] of a file or URL of problems; of a prepared folder, its test problems. Leaves out,
    and counts, problems whose answer is not a plain number, such as 1/2 or 3:30."""
    if not os.path.isfile(address) and not is_remote(address):
        test, download_dir = load_meta(address)["settings"]["test_source"], f"{address}/download"
        if test is None:
            raise ValueError(f"{address} has no test problems; give some with --data=FILE")
        address = test if is_remote(test) else os.path.join(address, test)
    documents = Documents(find_files(address, download_dir), "problems")
    problems, n_left_out = [], 0
    for question, _, text in documents:
        gold = final_number(text)
        if gold is None or re.search(r"#### -?[0-9.,]++.*[/:\d]", text):
            n_left_out += 1
        else:
            problems.append((question.removeprefix("Question: "), str(gold)))
    documents.report()
    if n_left_out:
        print(f"{address}: left out {n_left_out:,} problems whose answer is no number")
    if not problems:
        raise ValueError(f"{address} holds no problem whose answer is a number")
    return problems


def answer_problems(model, tokenizer, indices, problems, cfg):
    """Records of problems (question, gold). An answer follows from problem and index, not from the batch."""
    questions, seeds = [q for q, _ in problems], [seed_for(cfg.seed, index) for index in indices]
    options = {k: getattr(cfg, k) for k in ("steps", "temperature", "remasking", "threshold", "cfg_scale")}
    with train.autocast(next(model.parameters()).device, cfg.dtype):
        answers = answer(model, tokenizer, questions, seeds, cfg.length, **options)
    records = []
    for (question, gold), (thoughts, text, passes) in zip(problems, answers):
        acc = final_number(text) == Decimal(gold)
        record = {"question": question, "gold": gold, "thoughts": thoughts, "answer": text}
        records.append(record | {"acc": acc, "forward_passes": passes})
    return records


def measure(model, tokenizer, items, cfg, path, rank, world_size):
    """Records of all items in order, from answer_problems or score_item. Each process takes every
    world_size-th item and appends its record to path.rank.jsonl; items that have one are not done again."""
    done = {}
    for part in glob.glob(glob.escape(path) + ".*.jsonl"):
        with open(part, "r+b") as file:
            records = map(json.loads, train.whole_lines(file).splitlines())
        done |= {record["index"]: record for record in records}
    if done and rank == 0:
        print(f"{len(done):,} of {len(items):,} items are in {path}.*.jsonl; remove it to do them again")
    if world_size > 1:
        torch.distributed.barrier()  # all have read before one writes
    todo = [i for i in range(rank, len(items), world_size) if i not in done]
    with open(f"{path}.{rank}.jsonl", "a") as file, tqdm(total=len(todo), disable=rank > 0) as bar:
        for start in range(0, len(todo), cfg.batch_size):
            indices = todo[start : start + cfg.batch_size]
            batch = [items[i] for i in indices]
            if cfg.task == "gsm8k":
                records = answer_problems(model, tokenizer, indices, batch, cfg)
            else:
                records = (score_item(model, tokenizer, item, cfg) for item in batch)
            for index, record in zip(indices, records):
                done[index] = {**record, "index": index}
                print(json.dumps(done[index]), file=file, flush=True)
                bar.update()
            bar.set_postfix_str(f"acc {np.mean([record['acc'] for record in done.values()]):.3f}")
    parts = [done] * world_size
    if world_size > 1:
        torch.distributed.all_gather_object(parts, done)
    return [parts[i % world_size][i] for i in range(len(items))]


def validation(checkpoint, data, limit):
    """(get_batch, number of sequences, meta) of a run's validation set, or of another prepared folder's."""
    run = checkpoint["run_config"]
    folder = data or os.path.join(run["data_dir"], run["dataset"])
    meta = load_meta(folder)
    if meta["tokenizer"] | {"pattern": None} != checkpoint["meta"]["tokenizer"] | {"pattern": None}:
        raise ValueError(f"{folder} has another vocabulary than the checkpoint; prepare it again")
    n = meta["tokens"]["val"] // run["block_size"]
    if is_fine_tuned(checkpoint):
        examples = {"val": load_examples(folder, meta, "val", run["block_size"])}
        n = len(examples["val"][1])
    n = max(2, min(n, limit or n))
    cfg = SimpleNamespace(**run | {"eval_seqs": n})
    if is_fine_tuned(checkpoint):
        return example_batches(examples, meta, cfg), n, meta
    return train.token_batches(folder, meta, cfg), n, meta


def summarize(records, cfg):
    """Means of a task's records with their standard errors (nan where there are too few), and counts."""
    if cfg.task == "gsm8k":
        asked = [record for record in records if record["thoughts"] is not None]  # there was room
        wrong = [record for record in asked if not record["acc"]]
        n_empty = sum(not record["answer"] for record in wrong)
        counts = {"wrong": len(wrong), "wrong_and_empty": n_empty, "no_room": len(records) - len(asked)}
        keys, records = ["acc", "forward_passes"], asked
    else:
        keys = ["acc", "acc_norm", "acc_bytes"] if "choices" in records[0] else ["acc", "log_p"]
        counts = {"contexts_cut": sum(record["cut"] > 0 for record in records)}
    result = {"n": len(records)}
    for key in keys:
        values = np.array([record[key] for record in records] or [math.nan], float)
        se = values.std() / math.sqrt(len(values) - 1 or math.nan)
        result |= {key: values.mean(), f"{key}_se": se}
    return result | counts


def main():
    cfg, set_by = configurator.parse(EvalConfig)
    rank, world_size, device = train.setup_distributed(cfg.device)
    path = os.path.join(cfg.out_dir, "ckpt.pt") if os.path.isdir(cfg.out_dir) else cfg.out_dir
    model, tokenizer, checkpoint = load_trained(path, device)
    run, folder = checkpoint["run_config"], cfg.results or os.path.dirname(path) or "."
    results_path = os.path.join(folder, "results.json")
    if rank == 0:
        lock = train.open_locked(os.path.join(folder, ".eval.lock"))
        results = read_json(results_path) if os.path.exists(results_path) else {}
        print(configurator.describe(cfg, set_by))
    if cfg.task == "loss":
        get_batch, n, data = validation(checkpoint, cfg.data, cfg.limit)
    elif cfg.task == "gsm8k":
        corpus = os.path.join(run["data_dir"], run["dataset"])
        data = read_problems(cfg.data or corpus, f"{corpus}/download")[: cfg.limit]
    else:
        data = read_items(cfg.task)[: cfg.limit]
        for item in data:  # refuses a text that is too long before the work
            encode_item(tokenizer, item, cfg.delimiter, model.config.block_size)
    # a result is named by what it depends on: settings, data and checkpoint
    aside = {"out_dir": "", "results": "", "batch_size": 0, "device": ""}
    facts = json.dumps([asdict(cfg) | aside, data, file_sha256(path)])
    task = os.path.splitext(os.path.basename(cfg.task))[0]
    name = f"{task}-{zlib.crc32(facts.encode()):08x}"
    if cfg.task == "loss":
        B = run["micro_batch_size"]
        nats, se, *_ = train.validate(model, get_batch, B, n, cfg.dtype, cfg.mc_num, rank, world_size)
        result = {"n": n, "nats_per_token": nats, "nats_per_token_se": se, "perplexity_bound": math.exp(nats)}
    else:
        records = measure(model, tokenizer, data, cfg, os.path.join(folder, name), rank, world_size)
        result = summarize(records, cfg)
    if rank == 0:
        results[name] = {**result, "step": checkpoint["step"], "settings": asdict(cfg), **train.made_by()}
        train.write_file(results_path, lambda file: file.write(json.dumps(results, indent=1).encode()))
        lock.close()
        print(f"{name}: {cfg.out_dir}, step {checkpoint['step']:,}; added to {results_path}")
        for key in (key for key in result if not key.endswith("_se")):
            error = f" ± {result[f'{key}_se']:.4f}" if f"{key}_se" in result else ""
            print(f"  {key:<16} {round(result[key], 4)}{error}")


if __name__ == "__main__":
    configurator.run(main)
