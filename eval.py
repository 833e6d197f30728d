"""Measures a trained model, with everything about it taken from its checkpoint.

    python eval.py --task=loss --out_dir=out/arithmetic                           # bound on -log p of the validation set
    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                      # answers the data set's test problems
    python eval.py --task=piqa.jsonl --out_dir=out/x --nll_type=chain_rule        # a file of questions with choices or targets
    python eval.py --task=hellaswag,arc_easy:cfg_scale=0.6 --out_dir=out/x        # lm-evaluation-harness (pip install lm-eval)
    python eval.py --task=sinks --out_dir=out/x --compare=out/y --plot=True       # where attention goes, step by step
    python eval.py --task=sink_changes --out_dir=out/x                            # bound with the sinks moved, zeroed, removed
    python eval.py --task=runs --out_dir=out/ablation                             # table of the runs below a folder
    torchrun --standalone --nproc_per_node=8 eval.py config/eval_paper.py --out_dir=out/472m-sink

Tasks are separated by commas, and each may have settings of its own behind colons. A .jsonl file has one item a line, either
{"context": "...", "choices": ["...", "..."], "gold": 0} or {"context": "...", "target": "..."}; a space joins the two texts.
Every item's result goes to a file at once, so that the same command goes on where it was interrupted. Numbers and settings are
added to out_dir/results.json. With several processes rank 0 runs the task, and all compute their share of each round.
"""

import collections
import copy
import dataclasses
import datetime
import difflib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import configurator
from model import MDM, apply_rope, check_decoding, generate, guided_logits, sample_tokens, surest
from prepare_data import CORPORA, Source
from sample import load_trained
from sft_gsm8k import SFTConfig, example_batches, solve
from train import (
    LENGTH_KEYS,
    RESUME_KEYS,
    TrainConfig,
    autocast,
    close_distributed,
    load_meta,
    made_by,
    mean_and_error,
    seed_for,
    setup_distributed,
    token_batches,
    validation_nll,
    vocabulary,
)  # fmt: skip


@dataclass
class EvalConfig:
    task: str = "loss"  # loss, gsm8k, sinks, sink_changes, file.jsonl, or the harness's; name:key=value:key=value,name,...; or runs
    out_dir: str = "out/arithmetic"  # folder of the checkpoint
    checkpoint: str = "ckpt.pt"  # ckpt.pt (the latest) or best.pt (lowest validation loss)
    data: str | None = (
        None  # gsm8k: file, folder or URL of problems; else a prepared folder; None: those of the training data
    )
    include_path: str | None = None  # harness: folder with task definitions (YAML) of your own
    limit: int | None = (
        None  # only the first so many items (validation sequences: evenly spread; sinks: 16 if not set)
    )
    # likelihood
    nll_type: str = (
        "mc"  # mc: Monte-Carlo bound, mc_num draws; chain_rule: left to right, a pass for each token
    )
    mc_num: int = 32  # draws of the noise for each request, or sequence of loss (the paper: 1024)
    mc_masking: str = (
        "exact"  # exact: a draw hides an exact number of tokens; coins: each by chance t, as the authors do
    )
    cfg_scale: float = (
        0.0  # w of classifier-free guidance towards context, question or prompt; else than 0, twice the work
    )
    batch_tokens: int = (
        4096  # tokens of a forward pass, padding included; changes no result, but for rounding
    )
    plot: bool = False  # loss, sinks: draw pictures into out_dir (pip install matplotlib)
    # sinks
    compare: str | None = None  # folder of a second checkpoint, to be shown beside the first
    layer: int | None = (
        None  # with plot: of the attention maps; None: where a token of the text gets most attention
    )
    prompt_length: int | None = (
        None  # tokens given of each validation sequence; 0: free text; None: a quarter, or the question
    )
    # generation
    batch_size: int = 64  # items of a process in a round; changes no result, but for rounding
    steps: int = 256  # denoising steps of thoughts, of the harness's and of sinks' texts; a row needs no more than it has tokens
    length: int | None = (
        None  # gsm8k: tokens of question and thoughts, filling included; None: the model's block_size
    )
    temperature: float = (
        0.1  # of thoughts, of sinks' texts, of the harness's if a task has none of its own; 0: the likeliest
    )
    answer_steps: int | None = None  # gsm8k: of the answer, as the next three keys; None: as for the thoughts
    answer_length: int | None = None  # tokens of question, thoughts and answer, filling included
    answer_temperature: float | None = None  # of the answer
    answer_cfg_scale: float | None = None  # towards question and thoughts
    remasking: str = (
        "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    )
    threshold: float | None = (
        None  # with confidence: keep all tokens above this probability: fewer passes; 0.9 is usual
    )
    block_length: int | None = None  # with confidence: write from left to right, so many places at a time
    prefix_cache: bool = (
        False  # with block_length: compute what is left of a block once a block; an approximation
    )
    seed: int = 0  # of the random draws, which each item has its own of
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16

    def __post_init__(self):
        for name in "limit batch_size batch_tokens mc_num steps length answer_steps answer_length".split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in "seed cfg_scale temperature prompt_length layer".split():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative, nor infinite")
        for name, wanted in {"nll_type": ("mc", "chain_rule"), "mc_masking": ("exact", "coins")}.items():
            if getattr(self, name) not in wanted:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be {wanted[0]!r} or {wanted[1]!r}"
                )
        if self.layer is not None and not self.plot:
            raise ValueError("layer is that of a picture; set plot=True, or leave it out")
        for prefix in ("", "answer_"):
            check_decoding(**self.decoding(prefix))

    def decoding(self, prefix=""):
        """Options of generate; with the prefix answer_ those of the answer, which where they are None are the others."""
        shared = {
            key: getattr(self, key) for key in ("remasking", "threshold", "block_length", "prefix_cache")
        }
        own = {key: getattr(self, prefix + key) for key in ("steps", "temperature", "cfg_scale")}
        return shared | {key: getattr(self, key) if value is None else value for key, value in own.items()}


# For each kind of task the settings that make a difference to it, and those that change no result
COMMON, LIKELIHOOD = "checkpoint limit dtype", "nll_type mc_num mc_masking cfg_scale seed"
DECODING = "steps temperature remasking threshold block_length"
SETTINGS = {
    "loss": ("mc_num", "data plot batch_size batch_tokens"),
    "gsm8k": (
        f"length cfg_scale seed {DECODING} prefix_cache answer_steps answer_length answer_temperature answer_cfg_scale",
        "data batch_size",
    ),
    "sinks": (f"prompt_length seed {DECODING}", "data compare plot layer batch_size batch_tokens"),
    "sink_changes": ("mc_num seed", "data batch_size batch_tokens"),
    "file": (LIKELIHOOD, "batch_size batch_tokens"),
    "harness": (f"{LIKELIHOOD} {DECODING} prefix_cache", "include_path batch_size batch_tokens"),
}
OWN_TASKS = "loss, gsm8k, sinks, sink_changes, runs, file.jsonl"


def kind_of(task):
    return task if task in SETTINGS else "file" if task.endswith(".jsonl") else "harness"


def plan(cfg, set_by):
    """The settings of each task in cfg.task. Raises ValueError for a setting that would make no difference."""
    tasks, used = [], {"task", "out_dir", "device"}
    for entry in cfg.task.split(","):
        name, *own = entry.strip().split(":")
        if not name:
            raise ValueError(
                f"task {entry!r} has no name; wanted {OWN_TASKS} or a task of lm-evaluation-harness"
            )
        if name == "runs":
            raise ValueError("task runs measures no model; call it alone")
        values = {}
        for setting in own:
            key, _, text = setting.partition("=")
            configurator.check_key(EvalConfig, key, f"task {name}")
            values[key] = configurator.convert(EvalConfig, key, text, f"task {name}")
        task = dataclasses.replace(cfg, **values | {"task": name})
        keys = {*settings_of(task), *SETTINGS[kind_of(name)][1].split()} - {"task"}
        if not values.keys() <= keys:
            raise ValueError(
                f"task {entry.strip()} makes no use of {', '.join(values.keys() - keys)}; leave it out"
            )
        tasks.append(task)
        used.update(keys - values.keys())
    idle = [f"{key} ({set_by[key]})" for key in set_by if key not in used]
    if idle:
        raise ValueError(f"--task={cfg.task} makes no use of {', '.join(idle)}; leave it out")
    return tasks


def settings_of(cfg):
    """What the result of a task depends on, besides weights and data."""
    keys = f"{COMMON} {SETTINGS[kind_of(cfg.task)][0]}".split()
    if "nll_type" in keys and cfg.nll_type == "chain_rule":
        keys = [key for key in keys if not key.startswith("mc_")]
    return {"task": cfg.task, **{key: getattr(cfg, key) for key in keys}}


@dataclass(eq=False)
class Trained:
    """A model with all that belongs to it, and this process's place among those that evaluate it."""

    model: MDM
    tokenizer: tiktoken.Encoding
    checkpoint: dict
    rank: int
    world_size: int

    @property
    def device(self):
        return self.model.device

    @functools.cached_property
    def identity(self):
        """What a result depends on, besides settings and data."""
        folder = os.path.dirname(os.path.abspath(__file__))
        code = [open(path, encoding="utf-8").read() for path in sorted(glob.glob(f"{folder}/*.py"))]
        weights = sha256(*self.checkpoint["model"].values())
        return {
            "device": self.device.type,
            "weights_sha256": weights,
            "code_sha256": sha256(code),
            **made_by(),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood of a continuation given a context


def encode_pair(tokenizer, context, continuation):
    """Token ids of a context and of its continuation, as they stand in the text of both: the first token that reaches beyond the
    context is the continuation's. An empty context becomes end-of-text, which comes before a text in training, too."""
    context, continuation = (
        text.encode("utf-8", "replace").decode() for text in (context, continuation)
    )  # half a surrogate pair
    ids = tokenizer.encode_ordinary(context + continuation)
    ends = np.cumsum([len(piece) for piece in tokenizer.decode_tokens_bytes(ids)])
    n_context = int((ends <= len(context.encode())).sum())
    return ids[:n_context] or [tokenizer.eot_token], ids[n_context:]


def fit(context, target, block_size):
    """The pair without what is too much at the left of the context. Raises ValueError for a target longer than block_size."""
    if len(target) > block_size:
        what = f"a continuation of {len(target)} tokens exceeds the model's block_size {block_size}"
        raise ValueError(f"{what}; leave that item out, or measure a model that takes more")
    return context[max(0, len(context) + len(target) - block_size) :], target


def hidden_tokens(context, target, nll_type, mc_num, mc_masking, seed):
    """The forward passes of a request: which tokens of the target are hidden in each, (n, L) bool, and with what weight each
    -log p counts, (n, L). The sum over all of weight * -log p estimates -log p(target | context).

    chain_rule   pass j sees target[:j] and predicts token j: exact for the left-to-right order, L passes
    mc           an estimate of the bound; t = (u + i) / mc_num is stratified over the draws i
      coins      each token is hidden with probability t, and weighs 1 / t
      exact      k = floor(t L) + 1 tokens are hidden, and weigh L / k: integrating the coins' t for a given k gives each k the
                 same chance. Less variance, because 1 / t is unbounded and L / k is not. The tokens are dealt from one shuffled
                 deck, so that each is hidden about as often as any other.

    The draws follow from the seed and the request's own tokens. Equal passes are made once."""
    L = len(target)
    if nll_type == "chain_rule" or L == 0:
        return np.triu(np.ones((L, L), bool)), np.eye(L)
    rng = np.random.default_rng([seed, zlib.crc32(np.array([*context, -1, *target]).tobytes())])
    t = (rng.random() + np.arange(mc_num)) / mc_num
    if mc_masking == "coins":
        hidden, weight = rng.random((mc_num, L)) < t[:, None], 1 / np.maximum(t, 1e-12)
    else:
        k = np.minimum(np.floor(t * L) + 1, L)
        dealt = np.cumsum(k) - k  # cards before this draw; the next k are its
        hidden, weight = (rng.permutation(L) - dealt[:, None]) % L < k[:, None], L / k
    hidden, number = np.unique(hidden, axis=0, return_inverse=True)
    weight = np.bincount(number.ravel(), weight / mc_num)[:, None] * hidden
    return hidden[hidden.any(axis=1)], weight[hidden.any(axis=1)]


@torch.no_grad()
def predict(model, rows, cfg_scale, batch_tokens, dtype="auto"):
    """Logits of rows of different lengths, longest first, as many at once as make batch_tokens with their padding.

    rows: (context ids, target ids, hidden (L,) bool, wanted (L,) bool) for each. Yields numbers of rows, and the guided logits
    (N, V) at their wanted places, one row after another."""
    device, mask_id = model.device, model.config.mask_id
    lengths = np.array([len(context) + len(target) for context, target, _, _ in rows])
    order, start = np.argsort(-lengths, kind="stable"), 0
    with autocast(device, dtype):
        sinks = model.sink_keys_values()
    while start < len(order):
        width = lengths[order[start]]
        numbers = order[start : start + max(1, batch_tokens // width)]
        x = np.zeros((len(numbers), width), np.int64)
        given, wanted = np.zeros((2, *x.shape), bool)
        for i, number in enumerate(numbers):
            context, target, is_hidden, is_wanted = rows[number]
            n = len(context)
            x[i, :n], given[i, :n] = context, True
            x[i, n : lengths[number]] = np.where(is_hidden, mask_id, target)
            wanted[i, n : lengths[number]] = is_wanted
        where = {"only": torch.from_numpy(np.flatnonzero(wanted)).to(device), "sinks": sinks}
        if lengths[numbers[-1]] < width:
            where["lengths"] = torch.from_numpy(lengths[numbers]).to(device)
        with autocast(device, dtype):
            logits = guided_logits(
                model, torch.from_numpy(x).to(device), torch.from_numpy(given).to(device), cfg_scale, **where
            )
        yield numbers, logits
        start += len(numbers)


def score(
    model,
    pairs,
    nll_type="mc",
    mc_num=32,
    mc_masking="exact",
    cfg_scale=0.0,
    seed=0,
    batch_tokens=4096,
    dtype="auto",
):
    """-log p(target | context) in nats for each pair of token ids, (n,) float64: the chain rule's, or an estimate of the bound (see
    hidden_tokens). With cfg_scale it is taken from guided logits: good to rank choices, but no likelihood of the model's, nor a
    bound on it."""
    rows, owner, weights = [], [], []
    for number, (context, target) in enumerate(pairs):
        for hidden, weight in zip(*hidden_tokens(context, target, nll_type, mc_num, mc_masking, seed)):
            rows.append((context, target, hidden, weight > 0))
            weights.append(weight[weight > 0])
            owner.append(number)
    return sum_rows(model, rows, weights, owner, len(pairs), cfg_scale, batch_tokens, dtype)


def sum_rows(model, rows, weights, owner, n, cfg_scale, batch_tokens, dtype="auto"):
    """Of rows as in predict, with the weights of their wanted places: the sums of weight * -log p by owner, (n,) float64."""
    total = np.zeros(n)
    for numbers, logits in predict(model, rows, cfg_scale, batch_tokens, dtype):
        target = np.concatenate([np.asarray(rows[r][1])[rows[r][3]] for r in numbers])
        nll = (
            F.cross_entropy(logits, torch.from_numpy(target).to(logits.device), reduction="none")
            .cpu()
            .double()
            .numpy()
        )
        nll *= np.concatenate([weights[r] for r in numbers])
        np.add.at(total, np.concatenate([np.full(len(weights[r]), owner[r]) for r in numbers]), nll)
    broken = total[~np.isfinite(total)]
    if len(broken):
        raise ValueError(
            f"a -log p is {broken[0]}: the model is broken, or dtype too small; try --dtype=float32"
        )
    return total


def greedy_matches(model, pairs, cfg_scale=0.0, batch_tokens=4096, dtype="auto"):
    """Would greedy decoding write the target? It reveals one token a step, the surest one. (n,) bool.
    A request is over at its first wrong token, so most cost a pass or two."""
    hidden = [np.ones(len(target), bool) for _, target in pairs]
    matches = np.ones(len(pairs), bool)
    while active := [i for i in range(len(pairs)) if matches[i] and hidden[i].any()]:
        rows = [(*pairs[i], hidden[i].copy(), hidden[i].copy()) for i in active]
        for numbers, logits in predict(model, rows, cfg_scale, batch_tokens, dtype):
            for r, row_logits in zip(numbers, logits.split([int(rows[r][3].sum()) for r in numbers])):
                place = (
                    torch.device("cpu") if logits.device.type == "mps" else logits.device
                )  # float64, which MPS lacks
                tokens, confidence = sample_tokens(row_logits.to(place), temperature=0.0)
                best = int(surest(confidence, 1).nonzero())
                at = np.flatnonzero(hidden[active[r]])[best]
                hidden[active[r]][at] = False
                matches[active[r]] = tokens[best].item() == pairs[active[r]][1][at]
    return matches


# ---------------------------------------------------------------------------------------------------------------------
# Work that processes share, and the loop over a task's items


def spread(job, cfg, trained, items):
    """The job's result for each item, in order. Rank 0 calls it; every process takes its share, the others in `serve`."""
    if trained.world_size > 1:
        dist.broadcast_object_list([(job, cfg, items)], device=trained.device)
    return do_share(job, cfg, trained, items)


def serve(trained):
    """What the processes beside rank 0 do: their shares of whatever comes, until there is no more."""
    while True:
        call = [None]
        dist.broadcast_object_list(call, device=trained.device)
        if call[0] is None:
            return
        job, cfg, items = call[0]
        do_share(job, cfg, trained, items)


def do_share(job, cfg, trained, items):
    rank, world_size = trained.rank, trained.world_size
    results = job(cfg, trained, items[rank::world_size])
    if world_size == 1:
        return results
    parts = [None] * world_size if rank == 0 else None
    dist.gather_object(results, parts)
    if rank == 0:
        in_order = [None] * len(items)
        for number, part in enumerate(parts):
            in_order[number::world_size] = part
        return in_order


def loglikelihoods(cfg, trained, texts, with_greedy=True):
    """Job: for each (context, continuation) log_p in nats, whether greedy decoding writes the continuation (None: not asked), its
    number of tokens, and how many tokens were cut off the context."""
    pairs = [encode_pair(trained.tokenizer, *pair) for pair in texts]
    kept = [fit(*pair, trained.model.config.block_size) for pair in pairs]
    nll = score(trained.model, kept, **score_options(cfg)).tolist()
    greedy = [None] * len(texts)
    if with_greedy:
        greedy = greedy_matches(trained.model, kept, cfg.cfg_scale, cfg.batch_tokens, cfg.dtype).tolist()
    return [
        {
            "log_p": -nll[i],
            "greedy": greedy[i],
            "tokens": len(pairs[i][1]),
            "cut": len(pairs[i][0]) - len(kept[i][0]),
        }
        for i in range(len(texts))
    ]


def score_options(cfg):
    return {key: getattr(cfg, key) for key in f"{LIKELIHOOD} batch_tokens dtype".split()}


def rolling_loglikelihoods(cfg, trained, texts):
    """Job: log_p of whole texts in nats, in pieces that fill the model: each given the last token of the one before, and the last,
    shorter piece as many tokens as have room. The harness cuts in the same way."""
    eot, n = trained.tokenizer.eot_token, trained.model.config.block_size - 1
    pairs, owner = [], []
    for number, text in enumerate(texts):
        ids = [eot, *trained.tokenizer.encode_ordinary(text)]
        starts = range(1, len(ids), n)
        pairs += [
            (ids[max(0, min(start + n, len(ids)) - n - 1) : start], ids[start : start + n])
            for start in starts
        ]
        owner += [number] * len(starts)
    nll = score(trained.model, pairs, **score_options(cfg))
    return [
        {"log_p": -total} for total in np.bincount(np.array(owner, int), nll, minlength=len(texts)).tolist()
    ]


def continuations(cfg, trained, requests):
    """Job: the text that the model writes behind each context, up to its end-of-text, and how many tokens were cut off the context.
    A request is (context, the harness's options, how many equal requests came before it); its text depends on nothing else.

    Context and text share the model's block_size. If max_gen_toks leaves too little of it, the text takes what the context leaves,
    but at least half."""
    model, tokenizer = trained.model, trained.tokenizer
    eot, block_size = tokenizer.eot_token, model.config.block_size
    prompts, lengths, temperatures, records = [], [], [], [None] * len(requests)
    for number, (context, options, _) in enumerate(requests):
        ids = tokenizer.encode_ordinary(context) or [eot]
        n_new = min(options["max_gen_toks"], max(block_size - len(ids), block_size // 2))
        prompts.append(ids[-(block_size - n_new) :])
        lengths.append(len(prompts[-1]) + n_new)
        temperatures.append(options.get("temperature", cfg.temperature if options["do_sample"] else 0.0))
        records[number] = {"cut": len(ids) - len(prompts[-1])}
    left = sorted(range(len(requests)), key=lambda i: (temperatures[i], -lengths[i]))
    while left:
        first, width = left[0], lengths[left[0]]
        batch = [
            i for i in left[: max(1, cfg.batch_tokens // width)] if temperatures[i] == temperatures[first]
        ]
        left = left[len(batch) :]
        x = torch.full((len(batch), width), eot)
        for row, i in enumerate(batch):
            x[row, : lengths[i]] = model.config.mask_id
            x[row, : len(prompts[i])] = torch.tensor(prompts[i])
        with autocast(trained.device, cfg.dtype):
            filled, _ = generate(
                model, x.to(trained.device), **cfg.decoding() | {"temperature": temperatures[first]}, eot_id=eot,
                seeds=[seed_for(cfg.seed, zlib.crc32(np.array([requests[i][2], *prompts[i]]).tobytes())) for i in batch],
                lengths=torch.tensor([lengths[i] for i in batch], device=trained.device),
            )  # fmt: skip
        for i, ids in zip(batch, filled.tolist()):
            ids = ids[len(prompts[i]) : lengths[i]]
            text = tokenizer.decode(ids[: ids.index(eot)] if eot in ids else ids)
            for stop in requests[i][1]["until"]:
                text = text.split(stop)[0] if stop else text
            records[i]["text"] = text
    return records


def measure(cfg, trained, job, items, data_sha256, progress=lambda records: "", label=None, unit="item"):
    """The job's record (a dict) of each item, in rounds: name of the measurement, records, and what there is to know about it.
    Records go to out_dir/name.jsonl at once, and those that an interrupted run has left there are not computed again."""
    identity = {"settings": settings_of(cfg), "data_sha256": data_sha256, **trained.identity}
    label = label or os.path.splitext(os.path.basename(cfg.task))[0]
    name = f"{label}-{sha256(identity)[:8]}"  # another measurement has another name, so that two never share a file
    path = os.path.join(cfg.out_dir, f"{name}.jsonl")
    records = read_records(path)
    done = len(records)
    if done:
        print(f"{path} holds {done:,} of {len(items):,} items; going on behind them")
    start_time = time.time()
    bar = tqdm(total=len(items), initial=done, desc=label, unit=unit, disable=not sys.stderr.isatty())
    with bar, open(path, "a", encoding="utf-8", errors="replace") as file:
        per_round = cfg.batch_size * trained.world_size
        for start in range(done, len(items), per_round):
            round_time = time.time()
            new = spread(job, cfg, trained, items[start : start + per_round])
            seconds = round((time.time() - round_time) / len(new), 4)  # an item's share
            new = [{**record, "index": start + i, "seconds": seconds} for i, record in enumerate(new)]
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
            file.flush()
            records += new
            bar.update(len(new))
            bar.set_postfix_str(progress(records))
            if bar.disable:
                rate = (len(records) - done) / (time.time() - start_time)
                left = tqdm.format_interval((len(items) - len(records)) / rate)
                place = f"{label} {len(records):,} of {len(items):,}"
                print(f"{place}  {rate:.1f} {unit}s/s  {left} left  {progress(records)}", flush=True)
    return (
        name,
        records,
        {"n": len(records), "seconds": sum(r["seconds"] for r in records), "items": path, **identity},
    )


def means(values):
    """{name: mean, name_se: its standard error} of values by name, each (n,)."""
    result = {}
    for name, numbers in values.items():
        numbers = np.asarray(numbers, float)
        result[name] = float(numbers.mean())
        result[f"{name}_se"] = (
            float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else None
        )
    return result


# ---------------------------------------------------------------------------------------------------------------------
# --task=loss: the bound on the validation set


@functools.lru_cache(maxsize=2)  # compare has two models
def validation(trained, data, limit):
    """(get_batch, number of sequences, sha256 of the tokens) of a prepared folder (None: the one trained on), read as in training:
    as many sequences as the tokens fill, or all examples of fine-tuning; limit of them, evenly spread. A batch is a sequence."""
    run = trained.checkpoint["run_config"] | {"micro_batch_size": 1}
    folder = data or os.path.join(run["data_dir"], run["dataset"])
    meta = load_meta(folder, splits=("val",))
    if vocabulary(meta) != vocabulary(trained.checkpoint["meta"]):
        raise ValueError(
            f"{folder} has another vocabulary than the checkpoint; prepare it with the same tokenizer"
        )
    if "epochs" in run:  # sft_gsm8k.py's
        cfg = SFTConfig(**run)
        get_batch, parts = example_batches(folder, meta, cfg)
        n = len(parts["val"][1])
    else:
        cfg = TrainConfig(**run)
        get_batch, n = token_batches(folder, meta, cfg), meta["tokens"]["val"] // cfg.block_size
    cfg.eval_seqs = max(2, min(n, limit or n))  # an error needs two
    return get_batch, cfg.eval_seqs, meta["sha256"]


def validation_rows(cfg, trained, rows):
    """x0 and maskable (n, T) of these validation sequences."""
    get_batch = validation(trained, cfg.data, cfg.limit)[0]
    return [torch.cat(tensors) for tensors in zip(*(get_batch("val", row) for row in rows))]


def bounds(cfg, trained, rows):
    """Job of loss: mc_num draws of the bound of each validation sequence."""
    n_rows = validation(trained, cfg.data, cfg.limit)[1]
    text, eot = trained.tokenizer, trained.tokenizer.eot_token
    n_bytes = torch.tensor(
        [0 if i == eot else len(text.decode_single_token_bytes(i)) for i in range(text.n_vocab)]
    )
    at_once, records = max(1, cfg.batch_tokens // trained.model.config.block_size), []
    for chunk in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
        x0, maskable = validation_rows(cfg, trained, chunk)
        nll, t = validation_nll(trained.model, x0, maskable, np.array(chunk), n_rows, cfg.mc_num, cfg.dtype)
        for row, (ids, counted) in enumerate(zip(x0, maskable)):
            sizes = {"tokens": int(counted.sum()), "bytes": int(n_bytes[ids[counted]].sum())}
            records.append({**sizes, "t": t[:, row].tolist(), "nll": nll[:, row].tolist()})
    return records


def bound_of(records, others=None):
    """Nats per token and standard error of records of `bounds`; of their difference to others of the same sequences and masks."""
    tokens, t, nll = (
        torch.tensor([record[key] for record in records], dtype=torch.float64)
        for key in ("tokens", "t", "nll")
    )
    if others is not None:
        nll = nll - torch.tensor([record["nll"] for record in others], dtype=torch.float64)
    order = t[:, 0].argsort()  # t and nll are (sequences, mc_num)
    return mean_and_error(nll.mean(dim=1)[order], tokens[order])


def loss(cfg, trained):
    """Bound on -log p of the validation set, in total and over t. Returns the name of the measurement and its result."""
    Figure = import_figure() if cfg.plot else None  # what is missing is told before the work
    _, n_rows, data_sha256 = validation(trained, cfg.data, cfg.limit)
    name, records, facts = measure(cfg, trained, bounds, list(range(n_rows)), data_sha256, unit="sequence")
    tokens, n_bytes, t, nll = (
        np.array([r[key] for r in records], float) for key in ("tokens", "bytes", "t", "nll")
    )
    nats, se = bound_of(records)
    bits = tokens.sum() / n_bytes.sum() / math.log(2)
    over_t = []
    for i in range(10):
        here = np.clip(np.floor(t * 10), 0, 9) == i
        seen = here.any(axis=1)
        draws = (np.where(here, nll, 0).sum(axis=1) / np.maximum(1, here.sum(axis=1)) / tokens)[
            seen
        ]  # a sequence's mean
        if seen.any():  # of nll / p_mask over all tokens: the same as of nll over the hidden ones
            over_t.append({"from": i / 10, "to": (i + 1) / 10, **means({"nats_per_hidden_token": draws})})
    print(f"{'t':>9}  nats per hidden token")
    for part in over_t:
        print(f"{part['from']:.1f} - {part['to']:.1f}  {with_error(part, 'nats_per_hidden_token')}")
    if cfg.plot:
        plot_over_t(Figure, over_t, os.path.join(cfg.out_dir, f"{name}.png"))
    return name, {
        "nats_per_token": nats,
        "nats_per_token_se": se,
        "perplexity_bound": math.exp(nats),
        "perplexity_bound_se": math.exp(nats) * se,
        "bits_per_byte": nats * bits,
        "bits_per_byte_se": se * bits,
        "over_t": over_t,
        **facts,
    }


def import_figure():
    try:
        import matplotlib.figure
    except ImportError:
        raise ValueError("plot=True needs matplotlib; pip install matplotlib") from None
    return matplotlib.figure.Figure


def plot_over_t(Figure, over_t, path):
    t = [(part["from"] + part["to"]) / 2 for part in over_t]
    nats, se = ([part[f"nats_per_hidden_token{end}"] or 0 for part in over_t] for end in ("", "_se"))
    figure = Figure(figsize=(6, 4))
    panel = figure.subplots()
    panel.errorbar(t, nats, se, marker="o", capsize=3)
    panel.set(xlabel="noise level t (share of hidden tokens)", ylabel="nats per hidden token", xlim=(0, 1))
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    print(f"{path}: the table above as a picture")


# ---------------------------------------------------------------------------------------------------------------------
# --task=file.jsonl: choices, or a target


def read_items(path):
    """Items of a .jsonl file, all with choices or all with a target. Raises ValueError with the line that is something else."""
    if not os.path.exists(path):
        raise ValueError(f"task file {path} not found")
    items, wanted = (
        [],
        '{"context": text, "choices": [text, ...], "gold": number} or {"context": text, "target": text}',
    )
    with open(
        path, encoding="utf-8-sig", errors="replace"
    ) as file:  # -sig: some editors write a mark in front
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
                answers = item["choices"] if "choices" in item else [item["target"]]
                encoded = [
                    text.encode() for text in [item["context"], *answers]
                ]  # a lone surrogate or a number raises
                fits = isinstance(answers, list) and all(encoded[1:])
                fits = fits and (
                    "choices" not in item or type(item["gold"]) is int and 0 <= item["gold"] < len(answers)
                )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                fits = False
            if not fits or ("choices" in item) != ("choices" in (items or [item])[0]):
                raise ValueError(
                    f"{path}, line {number}: wanted {wanted}, the same kind in all lines; got {line.strip()[:80]!r}"
                )
            items.append(item)
    if not items:
        raise ValueError(f"{path} holds no items; wanted {wanted}")
    return items


def answer_choices(cfg, trained, items):
    """Job of a file: log p of every choice of each item."""
    texts = [(item["context"], " " + choice) for item in items for choice in item["choices"]]
    scored = iter(loglikelihoods(cfg, trained, texts, with_greedy=False))
    records = []
    for item in items:
        of_choices = [next(scored) for _ in item["choices"]]
        log_p, tokens, cut = ([record[key] for record in of_choices] for key in ("log_p", "tokens", "cut"))
        n_characters, n_bytes = (
            [len(text) for text in item["choices"]],
            [len(text.encode()) for text in item["choices"]],
        )
        by_length = {"acc": np.ones(len(log_p)), "acc_norm": n_characters, "acc_bytes": n_bytes}
        right = {
            key: int(np.argmax(np.array(log_p) / lengths)) == item["gold"]
            for key, lengths in by_length.items()
        }
        records.append({**item, "log_p": log_p, "tokens": tokens, "cut": cut, **right})
    return records


def answer_targets(cfg, trained, items):
    """Job of a file: log p of each item's target, and whether greedy decoding writes it."""
    scored = loglikelihoods(cfg, trained, [(item["context"], " " + item["target"]) for item in items])
    return [{**item, **record, "acc": record["greedy"]} for item, record in zip(items, scored)]


def file(cfg, trained):
    """acc, and by the kind of items acc_norm (log p over characters) and acc_bytes (over bytes), or the perplexity of a target: all
    as lm-evaluation-harness defines them. Returns the name of the measurement and its result."""
    items = read_items(cfg.task)[: cfg.limit]
    job = answer_choices if "choices" in items[0] else answer_targets
    name, records, facts = measure(
        cfg, trained, job, items, sha256(items), lambda rs: f"acc {np.mean([r['acc'] for r in rs]):.3f}"
    )
    if job is answer_choices:
        result = means({key: [r[key] for r in records] for key in ("acc", "acc_norm", "acc_bytes")})
    else:
        result = means({"acc": [r["acc"] for r in records], "log_p": [r["log_p"] for r in records]})
        result["perplexity"] = math.exp(min(700, -result["log_p"]))
        result["perplexity_se"] = result["log_p_se"] and result["perplexity"] * result["log_p_se"]
    return name, result | {"contexts_cut": sum(bool(np.max(r["cut"])) for r in records)} | facts


# ---------------------------------------------------------------------------------------------------------------------
# --task=gsm8k: exact match of the answers to word problems


def final_number(text):
    """The number behind the first '#### ' of a text as OpenAI's grader reads it, commas removed; None if there is none."""
    match = re.search(r"#### (\-?[0-9\.\,]+)", text)
    try:
        return Decimal(match[1].replace(",", "")) if match else None
    except InvalidOperation:  # such as 1.2.3
        return None


def read_problems(address, download_dir):
    """[(question, gold number)] of a source of problems. Lines that are none are left out and reported."""
    source = Source(address, "problems", download_dir)
    texts = [text for text, _ in source]  # question, thoughts, answer, question, ...
    problems = [(q.removeprefix("Question: "), final_number(a)) for q, a in zip(texts[::3], texts[2::3])]
    source.report_malformed()
    unknown = sum(gold is None for _, gold in problems)
    if unknown:
        print(f"{address}: left out {unknown:,} problems whose answer is no number")
    problems = [(question, gold) for question, gold in problems if gold is not None]
    if not problems:
        raise ValueError(
            f"{address} holds no problems; wanted question||thoughts #### answer, or OpenAI's .jsonl"
        )
    return problems


def answer_problems(cfg, trained, problems):
    """Job of gsm8k: thoughts and answer of each (number, question, gold). They follow from the problem and its number, not from
    batch_size or the number of processes."""
    first = {"length": cfg.length, **cfg.decoding()}
    second = {"length": cfg.answer_length or cfg.length, **cfg.decoding("answer_")}
    questions, seeds = (
        [question for _, question, _ in problems],
        [seed_for(cfg.seed, number) for number, _, _ in problems],
    )
    with autocast(trained.device, cfg.dtype):
        solved = solve(trained.model, trained.tokenizer, questions, seeds, first, second)
    records = []
    for (_, question, gold), (thoughts, answer, passes) in zip(problems, solved):
        record = {"question": question, "thoughts": thoughts, "answer": answer, "gold": str(gold)}
        records.append(record | {"correct": final_number(answer or "") == gold, "forward_passes": passes})
    return records


def gsm8k(cfg, trained):
    """Accuracy on a set of problems. Returns the name of the measurement and its result."""
    corpus = trained.checkpoint["meta"]["name"]
    folder = os.path.join(trained.checkpoint["run_config"]["data_dir"], corpus)
    address = cfg.data or CORPORA[corpus].test_source or os.path.join(folder, "test.txt")
    if cfg.data is None and "://" not in address and not os.path.exists(address):
        raise ValueError(f"data set {corpus} has no test problems at {address}; name some with --data=file")
    problems = [
        (i, *problem)
        for i, problem in enumerate(read_problems(address, os.path.join(folder, "download"))[: cfg.limit])
    ]
    data_sha256 = sha256([(question, str(gold)) for _, question, gold in problems])
    progress = lambda rs: f"{sum(r['correct'] for r in rs):,} of {len(rs):,} right"  # noqa: E731
    name, records, facts = measure(
        cfg, trained, answer_problems, problems, data_sha256, progress, unit="problem"
    )
    n, right, passes = len(records), *(sum(r[key] for r in records) for key in ("correct", "forward_passes"))
    accuracy = right / n
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    print(f"accuracy {accuracy:.1%} ± {error:.1%} (standard error): {right:,} of {n:,} right; ", end="")
    print(f"{passes / n:.1f} forward passes a problem; {facts['seconds']:.1f} s")
    return name, {
        "accuracy": accuracy,
        "accuracy_se": error,
        "right": right,
        "without_number": sum(final_number(r["answer"] or "") is None for r in records),
        "without_room": sum(
            r["answer"] is None for r in records
        ),  # question or thoughts fill the whole length
        "forward_passes": passes,
        "data": address,
        **facts,
    }


# ---------------------------------------------------------------------------------------------------------------------
# --task=sinks: where attention goes while a text is denoised (the paper, 4.4 and A.3)


def attention_weights(q, k, may_attend=None):
    """softmax(q k^T / sqrt(d) + M) (Eq. 5): the share of each key (column) in what a query (row) reads, (B, H, S, S). Computed here
    alone: training and sampling use scaled_dot_product_attention, which keeps no weights."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    if may_attend is not None:
        scores = scores.masked_fill(~may_attend, -math.inf)
    return scores.softmax(dim=-1)


@torch.no_grad()
def look_at_attention(model, xt, batch_tokens=4096, layer=None):
    """What the model's attention does on texts xt (B, T), in float32, results on the CPU:

    mass    (n_layer, B, S): attention that each position gets, mean over heads and over the text's queries; its sum over S is 1
    norms   (n_layer, B, S): L2 norm of each position's value vector, mean over heads
    error   largest difference between what a layer gives with these weights and what it gave with SDPA, relative to the latter
    maps    (B, S, S): the weights of one layer, mean over heads; None if no layer is named

    The first n_sink of the S positions are the sink tokens, and the others the text, wherever sink_position puts the sinks."""
    mass, norms, maps, errors = [[] for _ in model.blocks], [[] for _ in model.blocks], [], []

    def look(number, attention, args, output):
        x, rope, n_sink, may_attend, *_ = args
        q, k, v = attention.project(x, n_sink)
        weights = attention_weights(apply_rope(q, *rope), apply_rope(k, *rope), may_attend)
        if n_sink and attention.config.sink_attention == "split":  # whose sinks read their own values
            weights[:, :, :n_sink] = torch.eye(x.size(1), device=x.device)[:n_sink]
        errors.append(
            (attention.output(x, (weights @ v).transpose(1, 2)) - output).abs().max() / output.abs().max()
        )
        mass[number].append(weights[:, :, n_sink:].mean(dim=(1, 2)).cpu())
        norms[number].append(v.norm(dim=-1).mean(dim=1).cpu())
        if number == layer:
            maps.append(weights.mean(dim=1).cpu())

    hooks = [
        block.attn.register_forward_hook(functools.partial(look, i)) for i, block in enumerate(model.blocks)
    ]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32
    try:
        for part in xt.split(max(1, batch_tokens // xt.size(1))):
            model.hidden_states(part.to(model.device))
    finally:
        torch.set_float32_matmul_precision(precision)
        for hook in hooks:
            hook.remove()
    mass, norms = (torch.stack([torch.cat(parts) for parts in layers]) for layers in (mass, norms))
    return mass, norms, max(errors).item(), torch.cat(maps) if maps else None


def follow_sink(mass, norms, hidden, config):
    """The sink of one layer at each step of a trajectory: the position that gets most attention. Lists over the steps.

    mass, norms (steps, S) as in look_at_attention; hidden (steps, T), which tokens of the text were [MASK].
    A position is counted from the text's first token; all sink tokens count as -1 in front, as T at the end."""
    n_sink, (steps, S) = config.n_sink, mass.shape
    place = np.arange(S) - n_sink
    place[:n_sink] = -1 if config.sink_position == "front" else S - n_sink
    top, every = mass.argmax(axis=1), np.arange(steps)
    found = {
        "position": place[top],
        "mass": mass[every, top],
        "moved_by": np.abs(np.diff(place[top])),  # since the step before: one less than steps
        "hidden": (top >= n_sink) & hidden[every, top - n_sink],
        "norm": norms[every, top],
        "norm_of_others": np.array([np.median(np.delete(norms[step], top[step])) for step in every]),
        "masks_get": (mass[:, n_sink:] * hidden).sum(axis=1)
        / (hidden.sum(axis=1) / S),  # all [MASK]s; 1 is an even share
        "text_mass": mass[:, n_sink:].max(axis=1),  # of the token of the text that gets most
        "text_norm": np.median(norms[:, n_sink:], axis=1),
    }
    if n_sink:
        found |= {
            "sink_mass": mass[:, :n_sink].sum(axis=1),
            "sink_norm": norms[:, :n_sink].mean(axis=1),
        }  # of all sink tokens
    return {key: [round(x, 6) for x in values.tolist()] for key, values in found.items()}


def states(record, mask_id):
    """What the model saw at each step of a trajectory, (steps, T)."""
    tokens, step = np.array(record["tokens"]), np.array(record["step"])
    return torch.from_numpy(np.where(step < np.arange(step.max() + 1)[:, None], tokens, mask_id))


def trajectories(cfg, trained, rows):
    """Job of sinks: writes the hidden part of validation sequences, then looks at the attention of each step."""
    if not rows:
        return []
    model, mask_id, records = trained.model, trained.model.config.mask_id, []
    x0, maskable = validation_rows(cfg, trained, rows)
    given = cfg.prompt_length
    if given is None:
        given = 0 if "epochs" in trained.checkpoint["run_config"] else x0.size(1) // 4
    maskable = maskable & (torch.arange(x0.size(1)) >= given)
    if not maskable.any(dim=1).all():
        raise ValueError(f"prompt_length {given} leaves nothing to write of {x0.size(1)} tokens; lower it")
    x, after = torch.where(maskable, mask_id, x0).to(trained.device), []
    options = cfg.decoding() | {"cfg_scale": 0.0, "prefix_cache": False}  # which another task may have set
    with autocast(trained.device, cfg.dtype):
        seeds = [seed_for(cfg.seed, row) for row in rows]
        x, _ = generate(
            model, x, **options, seeds=seeds, on_step=lambda xt: after.append((xt == mask_id).cpu())
        )
    step = torch.where(
        maskable, torch.stack(after).sum(dim=0), -1
    )  # at which a token was revealed; -1: given
    for tokens, own in zip(x.tolist(), step.tolist()):
        record = {"tokens": tokens, "step": own}
        xt = states(record, mask_id)
        mass, norms, record["error"], _ = look_at_attention(model, xt, cfg.batch_tokens)
        hidden = (xt == mask_id).numpy()
        record["layers"] = [
            follow_sink(*layer, hidden, model.config) for layer in zip(mass.numpy(), norms.numpy())
        ]
        records.append(record)
    return records


def summarize_sinks(records):
    """For each layer means over steps, then over prompts with their standard errors."""
    layers = []
    for of_prompts in zip(*(record["layers"] for record in records)):
        columns = collections.defaultdict(list)
        for found in (
            {key: np.array(values) for key, values in of_prompt.items()} for of_prompt in of_prompts
        ):
            moved_by = found["moved_by"] if found["moved_by"].size else np.zeros(1)
            steps = found | {
                "moved_by": moved_by,
                "moved": moved_by > 0,
                "norm_ratio": found["norm"] / found["norm_of_others"],
            }
            if "sink_norm" in found:
                steps["sink_norm_ratio"] = found["sink_norm"] / found["text_norm"]
            for key, values in steps.items():
                columns[key].append(values.mean())
        layers.append(means(columns))
    return layers


SINKS_LEGEND = """
Means over steps, ± standard error over prompts. top: the position that gets most attention; moves: share of the steps
at which it is another one; places: how far it moves a step; is [MASK]: share of the steps. [MASK]s get: all of them
together, 1 is their even share. norms: of value vectors, over the median of the others (sinks': of the text)."""


def print_sinks(folder, run, n_positions):
    titles = {
        "mass": "top gets",
        "moved": "moves",
        "moved_by": "places",
        "hidden": "is [MASK]",
        "norm_ratio": "its norm",
    }
    titles["masks_get"] = "[MASK]s get"
    if run["n_sink"]:
        titles |= {"sink_mass": "sinks get", "sink_norm_ratio": "their norm", "text_mass": "text's top gets"}
    print(f"\n{folder}\nlayer" + "".join(f"{title:>16}" for title in titles.values()))
    for number, layer in enumerate(run["layers"]):
        print(f"{number:>5}" + "".join(f"{with_error(layer, key, 3):>16}" for key in titles))
    print(f"An even share of attention is {1 / n_positions:.4f}. ", end="")
    print(
        f"What is read with the recomputed weights differs from SDPA's by {run['error']:.0e} of it at most."
    )


def sinks(cfg, trained):
    """Follows attention through denoising trajectories, of one model or of two side by side. Returns the name of the measurement
    and its result. Writes sinks.json (each prompt's steps), sinks.npz (of the first prompt mass and value norm of every position,
    step and layer, and what was hidden), and with plot three pictures."""
    Figure = import_figure() if cfg.plot else None  # what is missing is told before the work
    cfg, runs = dataclasses.replace(cfg, limit=cfg.limit or 16), {cfg.out_dir: trained}
    rows = list(range(validation(trained, cfg.data, cfg.limit)[1]))
    if cfg.compare:
        if trained.world_size > 1 or os.path.realpath(cfg.compare) == os.path.realpath(cfg.out_dir):
            raise ValueError(
                "compare takes another folder than out_dir, and one process; leave it out, or torchrun"
            )
        runs[cfg.compare] = Trained(*load_trained(cfg.compare, cfg.checkpoint, trained.device), 0, 1)
        texts = [[part.tolist() for part in validation_rows(cfg, one, rows)] for one in runs.values()]
        if texts[0] != texts[1]:
            raise ValueError(
                f"{cfg.compare} has other validation sequences than {cfg.out_dir}; compare needs the same texts"
            )
    n_layer = min(one.model.config.n_layer for one in runs.values())
    if cfg.layer is not None and cfg.layer >= n_layer:
        raise ValueError(f"layer is {cfg.layer}; the layers are 0 to {n_layer - 1}")
    found, first = {}, {}
    for folder, one in runs.items():
        config = one.model.config
        at_once = max(1, min(cfg.batch_size, cfg.batch_tokens // config.block_size))
        own = dataclasses.replace(cfg, out_dir=folder, batch_size=at_once)
        name, records, facts = measure(
            own, one, trajectories, rows, validation(one, cfg.data, cfg.limit)[2], unit="prompt"
        )
        error = max(record["error"] for record in records)
        found[folder] = {
            "name": name,
            "n_sink": config.n_sink,
            "layers": summarize_sinks(records),
            "error": error,
            **facts,
        }
        print_sinks(folder, found[folder], config.n_sink + config.block_size)
        found[folder]["prompts"] = records
        xt = states(records[0], config.mask_id)
        mass, norms, _, _ = look_at_attention(one.model, xt, cfg.batch_tokens)
        first[folder] = {
            "mass": mass.numpy(),
            "norms": norms.numpy(),
            "hidden": (xt == config.mask_id).numpy(),
        }
        np.savez_compressed(os.path.join(folder, "sinks.npz"), **first[folder])
    print(SINKS_LEGEND)
    write_results(os.path.join(cfg.out_dir, "sinks.json"), found)
    if cfg.plot:
        layer = cfg.layer
        if layer is None:
            without = min(
                found.values(), key=lambda run: run["n_sink"]
            )  # there are tokens to be sinks, if anywhere
            layer = int(np.argmax([of_layer["text_mass"] for of_layer in without["layers"][:n_layer]]))
        plot_maps(Figure, runs, found, layer, os.path.join(cfg.out_dir, "sinks_maps.png"))
        plot_paths(Figure, found, os.path.join(cfg.out_dir, "sinks_paths.png"))
        plot_norms(Figure, found, first, os.path.join(cfg.out_dir, "sinks_norms.png"))
    print(f"added sinks.json, sinks.npz{' and sinks_*.png' if cfg.plot else ''} to {cfg.out_dir}")
    result = found[cfg.out_dir]
    return result["name"], {key: value for key, value in result.items() if key not in ("name", "prompts")}


def plot_maps(Figure, runs, found, layer, path):
    """Attention of the first prompt's tokens at an eighth and at seven eighths of its steps. Sink tokens are drawn wider."""
    figure = Figure(figsize=(4.6 * len(runs), 8), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False)
    for column, (folder, one) in zip(axes.T, runs.items()):
        n_sink, record = found[folder]["n_sink"], found[folder]["prompts"][0]
        last = max(record["step"])
        steps = [last // 8, last - last // 8]
        weights = look_at_attention(one.model, states(record, one.model.config.mask_id)[steps], layer=layer)[
            3
        ][:, n_sink:].numpy()
        sinks, text = weights[:, :, :n_sink], weights[:, :, n_sink:]
        T, at_end = text.shape[-1], one.model.config.sink_position == "end"
        sinks = np.repeat(sinks, max(1, T // 40), axis=2)
        left, right = (0, sinks.shape[-1]) if at_end else (sinks.shape[-1], 0)
        for panel, step, *parts in zip(column, steps, *((text, sinks) if at_end else (sinks, text))):
            image = panel.imshow(
                np.concatenate(parts, axis=1).clip(0.1 / T), norm="log", vmin=0.1 / T, vmax=1, cmap="magma",
                interpolation="nearest", extent=(-left - 0.5, T + right - 0.5, T - 0.5, -0.5),
            )  # fmt: skip
            panel.set(title=f"{folder}, layer {layer}, step {step}", xlabel="is read", ylabel="reads")
    figure.colorbar(image, ax=axes, label="attention, mean over heads", shrink=0.6)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def plot_paths(Figure, found, path):
    """The position that gets most attention at every step of the first prompt's trajectory, layer by layer."""
    n_layer = max(len(run["layers"]) for run in found.values())
    n_rows = -(-n_layer // 3)
    figure = Figure(figsize=(10, 2 * n_rows + 0.5), layout="constrained")
    axes = figure.subplots(n_rows, 3, sharex=True, sharey=True)
    for layer, panel in enumerate(axes.flat):
        panel.set_title(f"layer {layer}")
        panel.set_visible(layer < n_layer)
        for folder, run in found.items():
            if layer < len(run["layers"]):
                panel.plot(run["prompts"][0]["layers"][layer]["position"], label=folder, linewidth=1)
    figure.supxlabel("denoising step")
    figure.supylabel("position that gets most attention")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=100, bbox_inches="tight")


def plot_norms(Figure, found, first, path):
    """Value norms at eight steps of the first prompt, with the most-read token of each step (the paper's Figure 1)."""
    figure = Figure(figsize=(5.5 * len(found), 3.6), layout="constrained")
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)
    jitter = np.random.default_rng(0)
    for panel, (folder, arrays) in zip(axes[0], first.items()):
        mass, norms, hidden = arrays["mass"], arrays["norms"], arrays["hidden"]
        n_sink, some = found[folder]["n_sink"], np.linspace(0, mass.shape[1] - 1, 8).astype(int)
        sinks, text = np.split(norms[:, some], [n_sink], axis=2)  # (n_layer, 8, n_sink), (n_layer, 8, T)
        most_read = np.take_along_axis(text, mass[:, some, n_sink:].argmax(axis=2)[..., None], axis=2)
        groups = {
            "visible tokens": (text[:, ~hidden[some]], "0.7", 2),
            "[MASK]s": (text[:, hidden[some]], "tab:orange", 2),
        }
        groups["most-read token of the text"] = most_read, "tab:red", 14
        if n_sink:
            groups["sink token"] = sinks, "tab:blue", 14
        for label, (values, color, size) in groups.items():
            values = values.reshape(len(values), -1)  # (n_layer, points)
            x = np.arange(len(values))[:, None] + jitter.uniform(-0.3, 0.3, values.shape)
            panel.scatter(x, values, s=size, color=color, linewidths=0, label=label)
        panel.set(
            title=folder,
            xlabel="layer",
            ylabel="norm of the value, mean over heads",
            xticks=range(len(norms)),
        )
    panel.set_ylim(bottom=0)
    labels = {label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=4, markerscale=2)
    figure.savefig(path, dpi=100, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------------------------------
# --task=sink_changes: what of a trained model's sinks matters to it?

CHANGES = [
    "none",
    "moved to the other end",
    *(f"embedding: noise of its norm, {i}" for i in (1, 2, 3)),
    "values: zero",
    "removed",
]


@functools.lru_cache(maxsize=1)
def with_changed_sinks(trained, change, seed):
    """A copy whose sinks differ in one thing from those that the model was trained with."""
    model = copy.deepcopy(trained.model)
    config = model.config
    if change == "moved to the other end":
        config.sink_position = "end" if config.sink_position == "front" else "front"
    elif change.startswith("embedding"):
        noise = torch.randn(
            model.sink.shape, generator=torch.Generator().manual_seed(seed_for(seed, int(change[-1])))
        )
        noise = noise.to(model.device)
        model.sink.data = noise * (model.sink.norm(dim=1) / noise.norm(dim=1))[:, None]
    elif change == "values: zero":
        config.sink_zero_value = True
    elif change == "removed":
        config.n_sink = 0
    return dataclasses.replace(trained, model=model)


def changed_bounds(cfg, trained, items):
    """Job of sink_changes: mc_num draws of the bound for each (change, validation sequence)."""
    records = []
    for change, group in itertools.groupby(items, key=lambda item: item[0]):
        records += bounds(cfg, with_changed_sinks(trained, change, cfg.seed), [row for _, row in group])
    return records


def sink_changes(cfg, trained):
    """Bound of the model with other sinks than it was trained with, on the same sequences and masks, and its difference to the
    bound without a change. Returns the name of the measurement and its result."""
    if not trained.model.config.n_sink:
        raise ValueError(f"the model of {cfg.out_dir} has no sink tokens to change; train one with n_sink=1")
    _, n_rows, data_sha256 = validation(trained, cfg.data, cfg.limit)
    items = [(change, row) for change in CHANGES for row in range(n_rows)]
    name, records, facts = measure(cfg, trained, changed_bounds, items, data_sha256, unit="sequence")
    table = []
    print(f"{'change of the sinks':<32}{'nats per token':>20}{'more than unchanged':>22}")
    for change, start in zip(CHANGES, range(0, len(items), n_rows)):
        part = records[start : start + n_rows]
        numbers = bound_of(part) + bound_of(part, records[:n_rows])
        row = dict(zip(("nats_per_token", "nats_per_token_se", "more", "more_se"), numbers))
        print(f"{change:<32}{with_error(row, 'nats_per_token'):>20}{with_error(row, 'more'):>22}")
        table.append({"change": change, **row})
    return name, {"changes": table, **facts}


# ---------------------------------------------------------------------------------------------------------------------
# --task=runs: what training with other settings gave


def tabulate_runs(folder):
    """Prints the last validation bounds (nats per token) of the runs in folder/*/log.jsonl: a row for each kind of run, named by
    whatever the runs differ in but the seed; means over seeds with standard errors, also of the differences to the first row's
    runs of the same seeds, which saw the same texts and masks. Rows are in the order of the folders' names."""
    kinds = collections.defaultdict(dict)  # {settings as JSON: {seed: bound}}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*", "log.jsonl"))):
        try:
            with open(path) as file:
                lines = [json.loads(line) for line in file if line.endswith("\n")]
            starts, validations = ([line for line in lines if key in line] for key in ("config", "val_loss"))
            if not validations:
                continue
            settings = {
                **starts[-1]["config"],
                "init_from": starts[0]["config"]["init_from"],
                "step": validations[-1]["step"],
            }
            settings |= {key: starts[-1][key] for key in ("commit", "data_sha256")}
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(f"{path} is no log of train.py ({error!r}); move it away") from error
        seed = settings.pop("seed")
        same = {
            key: value
            for key, value in settings.items()
            if key not in RESUME_KEYS or key in (*LENGTH_KEYS, "init_from")
        }
        kind = kinds[json.dumps(same)]
        if seed in kind:
            raise ValueError(
                f"{path} is a second run of seed {seed} with the same settings and commit; move one of them away"
            )
        kind[seed] = validations[-1]["val_loss"]
    if not kinds:
        raise ValueError(
            f"no run with a validation in {folder}/*/log.jsonl; train some with --out_dir={folder}/name"
        )
    settings = [json.loads(kind) for kind in kinds]
    columns = [key for key in settings[0] if len({json.dumps(each.get(key)) for each in settings}) > 1]
    names = [[str(each.get(key)) for key in columns] for each in settings]
    widths = [2 + max(map(len, texts)) for texts in zip(columns, *names)]
    in_columns = lambda texts: "".join(text.ljust(width) for text, width in zip(texts, widths))  # noqa: E731
    print(f"{in_columns(columns)}{'seeds':>5}{'validation bound':>20}{'more than the first':>22}")
    first = next(iter(kinds.values()))
    for name, kind in zip(names, kinds.values()):
        more = [kind[seed] - first[seed] for seed in kind if seed in first and kind is not first]
        own, more = (
            with_error(means({"": numbers}), "") if numbers else "" for numbers in (list(kind.values()), more)
        )
        print(f"{in_columns(name)}{len(kind):>5}{own:>20}{more:>22}")


# ---------------------------------------------------------------------------------------------------------------------
# --task=<any other>: tasks of lm-evaluation-harness


@functools.lru_cache
def task_manager(include_path):
    """The harness's index of tasks, which takes it seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def harness(cfg, trained):
    """A task of lm-evaluation-harness, which makes the requests and the metrics. Its own table is printed, its JSON saved. Returns
    the name of the measurement and its result."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.api.model import LM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError as error:
        what = f"task {cfg.task!r} is none of {OWN_TASKS}, so it is taken for one of lm-evaluation-harness"
        raise ValueError(f"{what}, which cannot be imported ({error}); pip install lm-eval") from None

    class HarnessModel(LM):
        """Our side of the harness: its three kinds of requests."""

        records, data_sha256 = [], []

        def ask(self, kind, job, inputs):
            data_sha256 = sha256(inputs)
            _, records, _ = measure(
                cfg, trained, job, inputs, data_sha256, label=f"{label}-{kind}", unit="request"
            )
            self.records += records
            self.data_sha256.append(data_sha256)
            return records

        def loglikelihood(self, requests):
            records = self.ask("loglikelihood", loglikelihoods, [request.args for request in requests])
            return [(record["log_p"], record["greedy"]) for record in records]

        def loglikelihood_rolling(self, requests):
            records = self.ask("rolling", rolling_loglikelihoods, [request.args[0] for request in requests])
            return [record["log_p"] for record in records]

        def generate_until(self, requests):
            inputs, seen = [], collections.Counter()
            for context, options in (
                request.args for request in requests
            ):  # a task may ask the same several times, to vote
                inputs.append((context, normalize_gen_kwargs(options), seen[context, str(options)]))
                seen[context, str(options)] += 1
            return [record["text"] for record in self.ask("generate", continuations, inputs)]

    if cfg.include_path is not None and not os.path.isdir(cfg.include_path):
        raise ValueError(f"include_path {cfg.include_path} is no folder")
    manager, label = task_manager(cfg.include_path), cfg.task.replace("/", "_")
    if cfg.task not in manager.all_tasks:
        near = difflib.get_close_matches(cfg.task, manager.all_tasks, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name a folder of your own with --include_path"
        raise ValueError(f"lm-evaluation-harness has no task {cfg.task!r}; {hint}")
    model = HarnessModel()
    found = simple_evaluate(model, tasks=[cfg.task], limit=cfg.limit, task_manager=manager)
    print(make_table(found))
    identity = {"settings": settings_of(cfg), "data_sha256": sha256(*model.data_sha256), **trained.identity}
    name = f"{label}-{sha256(identity)[:8]}"
    path = os.path.join(cfg.out_dir, name)
    with open(f"{path}.json", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1, default=handle_non_serializable)
    result = {}
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, by = key.partition(",")
            if by and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{by}")
                label = metric if by == "none" else f"{metric},{by}"
                label = label if task == cfg.task else f"{task} {label}"
                result[label], result[f"{label}_se"] = value, error if isinstance(error, float) else None
    n = sum(counts["effective"] for counts in found["n-samples"].values())
    cut = sum(record.get("cut", 0) > 0 for record in model.records)
    seconds = sum(record["seconds"] for record in model.records)
    return name, {
        **result,
        "n": n,
        "contexts_cut": cut,
        "seconds": seconds,
        "items": f"{path}.json",
        **identity,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_records(path):
    """Records of an interrupted evaluation. A last line that was cut off is removed from the file."""
    if not os.path.exists(path):
        return []
    with open(path, "rb+") as file:
        text = file.read()
        whole = text.rfind(b"\n") + 1
        file.truncate(whole)
    try:
        return [{**json.loads(line)} for line in text[:whole].splitlines()]
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise ValueError(f"{path} is damaged ({error}); move it away to answer all problems anew") from error


def sha256(*parts):
    """Of tensors, and of what json can write."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if torch.is_tensor(part) else json.dumps(part).encode())
    return digest.hexdigest()


def read_results(path):
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as file:
            return {**json.load(file)}
    except (ValueError, TypeError) as error:  # no JSON, or no object
        raise ValueError(f"{path} is damaged ({error}); move it away") from error


def write_results(path, results):
    with open(path + ".tmp", "w") as file:
        json.dump(results, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def with_error(result, key, digits=4):
    error = result.get(f"{key}_se")
    return f"{result[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


KINDS = {
    "loss": loss,
    "gsm8k": gsm8k,
    "file": file,
    "harness": harness,
    "sinks": sinks,
    "sink_changes": sink_changes,
}


def main():
    cfg, set_by = configurator.parse(EvalConfig)
    if cfg.task == "runs":
        if idle := set_by.keys() - {"task", "out_dir", "device"}:
            raise ValueError(f"--task=runs makes no use of {', '.join(sorted(idle))}; leave it out")
        return tabulate_runs(cfg.out_dir)
    tasks = plan(cfg, set_by)
    # the other processes wait while rank 0 downloads data sets or computes the harness's metrics
    rank, world_size, device = setup_distributed(cfg.device, timeout=datetime.timedelta(hours=6))
    if rank == 0:
        print(configurator.describe(cfg, set_by))
    trained = Trained(*load_trained(cfg.out_dir, cfg.checkpoint, device), rank, world_size)
    if rank > 0:
        serve(trained)
    else:
        evaluate_tasks(cfg, tasks, trained)
        if world_size > 1:
            dist.broadcast_object_list([None], device=device)
    close_distributed()


def evaluate_tasks(cfg, tasks, trained):
    """Measures one task after another, adds each result to results.json, and prints them all in the end, with their settings."""
    path = os.path.join(cfg.out_dir, "results.json")
    results = read_results(path)  # a damaged file is told before the work, not behind it
    step = trained.checkpoint["step"]
    origin = {
        "step": step,
        "trained_on": trained.checkpoint["meta"]["sha256"],
        "run_config": trained.checkpoint["run_config"],
    }
    origin["processes"] = trained.world_size
    names = []
    for task in tasks:
        try:
            name, result = KINDS[kind_of(task.task)](task, trained)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where it stopped")
            raise
        results = read_results(path) | {name: result | origin}
        write_results(path, results)
        names.append(name)
    print(f"\n{cfg.out_dir}/{cfg.checkpoint}, step {step:,}")
    for name in names:
        result = results[name]
        settings = ", ".join(
            f"{key}={value}" for key, value in result["settings"].items() if key not in ("task", "checkpoint")
        )
        print(f"{name}: {result['n']:,} items; {settings}")
        for key in result:
            if f"{key}_se" in result:
                print(f"  {key:<20} {with_error(result, key)}")
        if result.get("contexts_cut"):
            print(f"  {result['contexts_cut']:,} contexts were cut from the left to fit")
    print(f"added to {path}")


if __name__ == "__main__":
    configurator.run(main)
