"""Measures a trained model, with everything about it taken from its checkpoint.

    python eval.py --task=gsm8k --out_dir=out/sft-arithmetic                     # answers the data set's test problems
    python eval.py --task=gsm8k --out_dir=out/x --data=test.jsonl --limit=50     # other problems, the first 50
    torchrun --standalone --nproc_per_node=8 eval.py --task=gsm8k --out_dir=out/sft-gsm8k

GSM8K: the thoughts are written from the question, then the answer from question and thoughts, and an answer is right if its
number is the right one. Every problem goes to a .jsonl file at once, so that the same command goes on where it was interrupted.
What was measured, and how, is added to out_dir/results.json.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation

import torch
import torch.distributed as dist
from tqdm import tqdm

import configurator
from prepare_data import CORPORA, Source
from sample import load_trained
from sft_gsm8k import solve
from train import autocast, close_distributed, seed_for, setup_distributed


@dataclass
class EvalConfig:
    task: str = "gsm8k"  # what to measure; gsm8k: exact match of the answers to word problems
    out_dir: str = "out/sft-arithmetic"  # folder of the checkpoint
    checkpoint: str = "ckpt.pt"  # ckpt.pt (the latest) or best.pt (lowest validation loss)
    data: str | None = None  # problems: file, folder or URL; None: the test set that belongs to the training data
    limit: int | None = None  # only the first so many problems
    batch_size: int = 64  # problems at once, in each process; changes no result, but for rounding
    steps: int = 256  # denoising steps of the thoughts; a row needs no more than it has tokens
    length: int | None = None  # tokens of question and thoughts, filling included; None: the model's block_size
    temperature: float = 0.1  # of the thoughts; 0: always the likeliest token
    cfg_scale: float = 0.0  # of the thoughts: classifier-free guidance towards the question; else than 0, twice the work
    answer_steps: int | None = None  # the same four for the answer; None: as for the thoughts
    answer_length: int | None = None  # tokens of question, thoughts and answer, filling included
    answer_temperature: float | None = None  # of the answer
    answer_cfg_scale: float | None = None  # of the answer, towards question and thoughts
    remasking: str = "confidence"  # confidence: keep the surest tokens first; random: the exact reverse process
    seed: int = 0  # of the random draws, which each problem has its own of
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32, bfloat16 or float16

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"unknown task {self.task!r}; there are {', '.join(TASKS)}")
        for name in ("limit", "batch_size", "steps", "length", "answer_steps", "answer_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


# What does not tell one measurement from another: it changes no result, or stands in its identity by itself
NEUTRAL_KEYS = "out_dir data batch_size device".split()


# ---------------------------------------------------------------------------------------------------------------------
# GSM8K


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
        raise ValueError(f"{address} holds no problems; wanted question||thoughts #### answer, or OpenAI's .jsonl")
    return problems


def answer_problems(cfg, model, tokenizer, problems, done, rank, world_size):
    """Answers the problems that come after the first `done`, and yields their records in order, a list at a time, on rank 0 (empty
    lists elsewhere). A record follows from the problem and its number: not from batch_size, nor from the number of processes."""
    keys = ("steps", "length", "temperature", "cfg_scale")
    first = {key: getattr(cfg, key) for key in keys} | {"remasking": cfg.remasking}
    second = first | {key: getattr(cfg, f"answer_{key}") for key in keys if getattr(cfg, f"answer_{key}") is not None}
    per_round = cfg.batch_size * world_size
    for start in range(done, len(problems), per_round):
        start_time = time.time()
        numbers = range(start, min(start + per_round, len(problems)))[rank::world_size]
        questions, seeds = [problems[i][0] for i in numbers], [seed_for(cfg.seed, i) for i in numbers]
        with autocast(model.lm_head.weight.device, cfg.dtype):
            solved = solve(model, tokenizer, questions, seeds, first, second)
        records = []
        for i, (thoughts, answer, passes) in zip(numbers, solved):
            question, gold = problems[i]
            record = {"index": i, "question": question, "thoughts": thoughts, "answer": answer, "gold": str(gold)}
            records.append(record | {"correct": final_number(answer or "") == gold, "forward_passes": passes})
        if world_size > 1:
            parts = [None] * world_size if rank == 0 else None
            dist.gather_object(records, parts)
            records = sorted(sum(parts, []), key=lambda record: record["index"]) if rank == 0 else []
        seconds = (time.time() - start_time) / max(1, len(records))  # a problem's share
        yield [record | {"seconds": round(seconds, 4)} for record in records]


def gsm8k(cfg, model, tokenizer, checkpoint, rank, world_size):
    """Accuracy on a set of problems. Returns on rank 0 the name of the measurement and its result; (None, None) elsewhere."""
    shared = [None, None]  # what rank 0 reads for all: the problems, and how many of them an interrupted run has done
    if rank == 0:
        corpus = checkpoint["meta"]["name"]
        folder = os.path.join(checkpoint["run_config"]["data_dir"], corpus)
        address = cfg.data or CORPORA[corpus].test_source or os.path.join(folder, "test.txt")
        if cfg.data is None and "://" not in address and not os.path.exists(address):
            raise ValueError(f"data set {corpus} has no test problems at {address}; name some with --data=file")
        problems = read_problems(address, os.path.join(folder, "download"))[: cfg.limit]
        identity = {
            "settings": {key: value for key, value in asdict(cfg).items() if key not in NEUTRAL_KEYS},
            "device": model.lm_head.weight.device.type,
            "data_sha256": sha256([(question, str(gold)) for question, gold in problems]),
            "weights_sha256": sha256(*checkpoint["model"].values()),
            "commit": commit(),
        }
        name = f"gsm8k-{sha256(identity)[:8]}"  # another measurement has another name, so that two never share a file
        path = os.path.join(cfg.out_dir, f"{name}.jsonl")
        records = read_records(path)
        if records:
            print(f"{path} holds {len(records):,} of {len(problems):,} problems; going on behind them")
        shared = [problems, len(records)]
    if world_size > 1:
        dist.broadcast_object_list(shared)
    problems, done = shared
    start = time.time()
    bar = tqdm(total=len(problems), initial=done, desc="gsm8k", unit="problem", disable=rank > 0 or not sys.stderr.isatty())
    with bar:
        for new in answer_problems(cfg, model, tokenizer, problems, done, rank, world_size):
            if rank > 0:
                continue
            with open(path, "a", encoding="utf-8", errors="replace") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
            records += new
            bar.update(len(new))
            progress = f"{sum(record['correct'] for record in records):,} of {len(records):,} right"
            bar.set_postfix_str(progress)
            if bar.disable:
                seconds_left = (time.time() - start) / (len(records) - done) * (len(problems) - len(records))
                print(f"{progress}  {tqdm.format_interval(seconds_left)} left", flush=True)
    if rank > 0:
        return None, None
    n, right, passes, seconds = len(records), *(sum(r[key] for r in records) for key in ("correct", "forward_passes", "seconds"))
    accuracy = right / n
    error = math.sqrt(accuracy * (1 - accuracy) / n)
    print(
        f"accuracy {accuracy:.1%} ± {error:.1%} (standard error): {right:,} of {n:,} right; "
        f"{passes / n:.1f} forward passes a problem; {seconds:.1f} s"
    )
    return name, {
        "accuracy": accuracy,
        "se": error,
        "n": n,
        "right": right,
        "without_number": sum(final_number(r["answer"] or "") is None for r in records),
        "without_room": sum(r["answer"] is None for r in records),  # question or thoughts fill the whole length
        "forward_passes": passes,
        "seconds": seconds,  # of all runs that it took
        "data": address,
        "problems": path,
        **identity,
    }


TASKS = {"gsm8k": gsm8k}

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
        return [json.loads(line) for line in text[:whole].splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away to answer all problems anew") from error


def sha256(*parts):
    """Of tensors, and of what json can write."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().tobytes() if torch.is_tensor(part) else json.dumps(part).encode())
    return digest.hexdigest()


def commit():
    """The commit of this code, with -dirty where files differ from it; None where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def read_results(path):
    if not os.path.exists(path):
        return {}
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away") from error


def write_results(path, results):
    with open(path + ".tmp", "w") as file:
        json.dump(results, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def main():
    cfg, set_by = configurator.parse(EvalConfig)
    rank, world_size, device = setup_distributed(cfg.device)
    if rank == 0:
        print(configurator.describe(cfg, set_by))
    model, tokenizer, checkpoint = load_trained(cfg.out_dir, cfg.checkpoint, device)
    path = os.path.join(cfg.out_dir, "results.json")
    read_results(path)  # a damaged file is told before the work, not behind it
    try:
        name, result = TASKS[cfg.task](cfg, model, tokenizer, checkpoint, rank, world_size)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on where it stopped") from None
    if rank == 0:
        made_by = {"step": checkpoint["step"], "torch": torch.__version__, "processes": world_size, "batch_size": cfg.batch_size}
        write_results(path, read_results(path) | {name: result | made_by})
        print(f"{path}: {name}")
    close_distributed()


if __name__ == "__main__":
    configurator.run(main)
