"""Trains a masked diffusion language model, on a laptop or on many GPUs.

    python train.py                                                                  # arithmetic, on a CPU in minutes
    python train.py config/shakespeare.py --n_sink=0 --out_dir=out/shakespeare-vanilla
    torchrun --standalone --nproc_per_node=8 train.py config/pretrain_472m_sink.py   # one node
    python train.py --init_from=resume --out_dir=out/arithmetic                      # goes on where it stopped

Everything that is random in a micro-batch follows from (seed, index), where index numbers the micro-batches of the whole run. So
a resumed run continues exactly, two processes do the work of one, and two variants see the same texts with the same masks.
`train` is the one training loop; what is particular to a task is its get_batch(split, index) -> x0, maskable.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from model import (
    MDM,
    MDMConfig,
    diffusion_loss,
    load_checkpoint,
    mask_tokens,
    noise_levels,
    tokens_for_flops,
    weighted_nll,
)
from prepare_data import file_sha256


@dataclass
class TrainConfig:
    # run
    dataset: str = "arithmetic"  # trains on data_dir/dataset, made by prepare_data.py
    data_dir: str = "data"  # where the data sets are
    out_dir: str | None = None  # checkpoints and log.jsonl go here; None: out/dataset
    init_from: str = "scratch"  # scratch, resume (out_dir/ckpt.pt), or a checkpoint to take the weights from
    seed: int = 0  # of weights, batches and masks
    # model
    preset: str | None = None  # a size of model.py's table, such as 34M, instead of the four keys that follow
    n_layer: int = 3  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 96  # width of the residual stream
    mlp_hidden: int | None = None  # hidden width of the MLP; None: 4 * n_embd
    block_size: int = 64  # tokens of a sequence, sinks not counted
    n_sink: int = 1  # sink tokens: 0 = vanilla MDM, 1 = the paper's, 2 and 4 its ablation
    sink_position: str = "front"  # front or end
    sink_zero_value: bool = False  # force the sinks' value vectors to zero
    gated_attention: bool = False  # the gated-attention baseline
    sink_attention: str = (
        "mask"  # mask: the paper's, as it stands; split: the same numbers without a mask, for fast kernels
    )
    # batch and length
    batch_size: int = 16  # sequences per optimizer step, over all processes
    micro_batch_size: int = 16  # sequences per process and forward pass; the rest is gradient accumulation
    max_steps: int | None = 4000  # optimizer steps
    train_flops: float | None = (
        None  # if set, instead of max_steps: train until C = 6 N D, as the authors' --flops
    )
    align_documents: bool | None = (
        None  # start sequences at documents; None: where they are short, one per line
    )
    # loss
    stratified_t: bool = (
        False  # spread the noise levels of a micro-batch evenly (the authors draw them independently)
    )
    random_length: float = 0.0  # share of micro-batches cut to a random length (SMDM: 0.01)
    # optimizer
    learning_rate: float = 1e-3  # peak, after warm-up
    min_lr: float = 1e-4  # at the end of the cosine
    warmup: float = 0.01  # share of the steps with a linearly rising rate
    weight_decay: float = 0.1  # on every tensor, norms and embeddings included, as the authors do
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    # validation and logging
    eval_interval: int = 500  # steps between validations, each of which also saves a checkpoint
    eval_seqs: int = 512  # validation sequences, with fixed masks
    log_interval: int = 100  # steps between log lines; the loss is the mean over these steps
    wandb: str | None = None  # project name: also log to Weights & Biases
    # machine
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = (
        "auto"  # float32, bfloat16 or float16 (autocast); auto: bfloat16 where a GPU has it, else float32
    )
    compile: bool = False  # torch.compile: a minute at the start, then faster steps

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.dataset}"
        positive = "block_size batch_size micro_batch_size eval_interval eval_seqs log_interval learning_rate train_flops"
        for name in positive.split():
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0, and finite")
        for name in "seed max_steps min_lr weight_decay grad_clip".split():
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative, nor infinite")
        for name in "warmup random_length beta1 beta2".split():
            if not 0 <= getattr(self, name) <= 1 or (name.startswith("beta") and getattr(self, name) == 1):
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        lengths = [key for key in LENGTH_KEYS if hasattr(self, key)]
        if all(getattr(self, key) is None for key in lengths):
            raise ValueError(f"{' and '.join(lengths)} are all None; one of them must set the length")
        if self.eval_seqs < 2:
            raise ValueError("eval_seqs is 1; a standard error needs at least 2")


MODEL_KEYS = [f.name for f in dataclasses.fields(MDMConfig) if f.name != "vocab_size"]
# What may be set anew when a run is resumed; any other key must keep its value.
RESUME_KEYS = """
    out_dir init_from data_dir max_steps train_flops epochs eval_interval log_interval wandb device compile sink_attention
""".split()
# Each sets the length of a run; of those that a config has (epochs is fine-tuning's), whichever is set counts.
LENGTH_KEYS = ["max_steps", "train_flops", "epochs"]


# ---------------------------------------------------------------------------------------------------------------------
# Data


def load_meta(folder: str, splits=("train", "val")) -> dict:
    """meta.json of a prepared data set. Raises ValueError if there is none, or if a file does not agree with it: in its size, or,
    of the given splits, in the sha256 of its tokens (which one process of a machine computes, at 1 to 2 GB a second)."""
    path = os.path.join(folder, "meta.json")
    data_dir, name = os.path.split(folder)
    command = f"python prepare_data.py {name}" + (
        "" if data_dir == TrainConfig.data_dir else f" --data_dir={data_dir}"
    )
    if not os.path.exists(path):
        raise ValueError(f"data set {folder} is not prepared; run: {command}")
    try:
        with open(path) as file:
            meta = json.load(file)
        sizes = {
            split: meta["tokens"][split] * np.dtype(meta["dtype"]).itemsize for split in ("train", "val")
        }
        checksums = {split: meta["sha256"][split] for split in splits}
        checksums |= {
            name: meta["sha256"][name] for split in splits if (name := f"{split}_cuts") in meta["sha256"]
        }
        numbers = [meta[key] for key in ("eot_id", "vocab_size", "documents")] + [*sizes.values()]
        if (
            not all(type(number) is int for number in numbers)
            or "name" not in meta["tokenizer"]
            or "one_per_line" not in meta
        ):
            raise TypeError("a number is none, or what the data set needs is missing")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); prepare the data set again: {command}") from error
    for split, wanted in sizes.items():
        path = os.path.join(folder, f"{split}.bin")
        found = os.path.getsize(path) if os.path.exists(path) else 0
        if found != wanted:
            raise ValueError(
                f"{path} has {found:,} bytes, meta.json says {wanted:,}; prepare the data set again: {command}"
            )
    for name, wanted in checksums.items() if os.environ.get("LOCAL_RANK", "0") == "0" else ():
        path = os.path.join(folder, f"{name}.npy" if name.endswith("_cuts") else f"{name}.bin")
        if os.path.getsize(path) > 10e9:
            print(f"comparing {path} ({os.path.getsize(path) / 1e9:.0f} GB) with its sha256", flush=True)
        if file_sha256(path) != wanted:
            raise ValueError(
                f"{path} holds other data than meta.json says (sha256); prepare the data set again: {command}"
            )
    return meta


def watch(path, wanted):
    """check(), which raises ValueError once somebody has replaced the file by one of another sha256 than wanted: a run of days
    must not go on with other data."""

    def identity():
        stat = os.stat(path)
        return stat.st_ino, stat.st_size, stat.st_mtime_ns

    before = identity()

    def check():
        nonlocal before
        now = identity()
        if now != before and file_sha256(path) != wanted:  # else it was only touched, or copied
            raise ValueError(
                f"{path} was replaced while it was read; prepare changed data under another --data_dir"
            )
        before = now

    return check


def token_batches(folder: str, meta: dict, cfg: TrainConfig):
    """get_batch for pretraining on a data set's token files: every token is maskable.

    Training sequences start at random places, drawn from (seed, index): anywhere, or with cfg.align_documents at the
    end-of-text before a document (all but the first have one). Validation sequence r of eval_seqs always starts at the same
    place; they are spread evenly."""
    B, T = cfg.micro_batch_size, cfg.block_size
    data, checks, places = {}, {}, {}
    for split in ("train", "val"):
        path = os.path.join(folder, f"{split}.bin")
        data[split], checks[split] = (
            np.memmap(path, meta["dtype"], mode="r"),
            watch(path, meta["sha256"][split]),
        )
        tokens = data[split]
        if len(tokens) < T:
            raise ValueError(f"{path} has {len(tokens)} tokens, fewer than block_size {T}; lower block_size")
        places[split] = range(len(tokens) - T + 1)
        if meta["one_per_line"] if cfg.align_documents is None else cfg.align_documents:
            places[split] = np.flatnonzero(tokens[: len(tokens) - T + 1] == meta["eot_id"])
            if len(places[split]) == 0:
                raise ValueError(
                    f"{path} has no document to start a sequence of {T} tokens at; set align_documents=False"
                )

    def get_batch(split, index):
        checks[split]()
        room = len(places[split])
        if split == "train":
            draws = np.random.default_rng([cfg.seed, index]).integers(room, size=B)
        else:
            draws = (np.arange(index * B, (index + 1) * B) * room // cfg.eval_seqs) % room
        starts = [places[split][i] for i in draws]
        x0 = np.stack([data[split][start : start + T] for start in starts]).astype(np.int64)
        if x0.max() >= meta["vocab_size"]:
            raise ValueError(
                f"{folder}/{split}.bin holds token {x0.max()}, meta.json has a vocabulary of {meta['vocab_size']}"
            )
        return torch.from_numpy(x0), torch.ones(B, T, dtype=torch.bool)

    return get_batch


# ---------------------------------------------------------------------------------------------------------------------
# Machine


def setup_distributed(device: str = "auto", timeout=None):
    """(rank, world_size, device) of this process; joins the group that torchrun describes in the environment, if any.
    timeout (a timedelta) is how long processes wait for each other before they give up; None: torch's 30 minutes."""
    distributed = "RANK" in os.environ
    if device == "auto":  # mps has no process groups
        has_mps = torch.backends.mps.is_available() and not distributed
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        if torch.device(device).type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("wanted cpu, cuda or mps")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used here ({str(error).splitlines()[0]}); try --device=auto"
        ) from error
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    if not distributed:
        return 0, 1, torch.device(device)
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # gloo also beside nccl: what processes tell each other about a step does not make them wait for their GPUs
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=timeout
        )
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def close_distributed():
    """Leaves the group, if there is one. All meet first: while rank 0 still writes, a process that left would hang in gloo's
    clean-up (seen with torch 2.6)."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def autocast(device, dtype: str):
    """The context in which a forward pass runs in dtype."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; wanted auto, float32, bfloat16 or float16")
    if dtype == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if has_bf16 else "float32"
    # no cache of cast weights: with it, the gradients of the head's parts would be summed in half precision
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32", cache_enabled=False)


# Dense peak of half-precision matrix products, FLOP/s, by the vendors' data sheets
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "V100": 125e12,
}


def peak_flops(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the loop


def get_lr(step, max_steps, peak, floor, warmup_steps):
    """Linear from 0 to peak over warmup_steps, then half a cosine down to floor at max_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step > max_steps:
        return floor
    progress = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def seed_for(seed, index) -> int:
    """32 bits from (seed, index). Plain sums would make one seed a shifted copy of another."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


@torch.no_grad()
def validation_nll(model, x0, maskable, rows, n_rows, mc_num=1, dtype="auto"):
    """Draws of the bound on -log p of the validation sequences x0 (B, T), numbers `rows` out of n_rows: (mc_num, B) nats, and
    their noise levels t (mc_num, B). All on the CPU.

    The mc_num * n_rows levels of the whole set are (i + 1/2) / (mc_num * n_rows), and a sequence's mc_num of them are evenly
    spaced. A sequence always has the same levels and the same noise, whatever the model, the machine or the batch."""
    shuffled = np.random.default_rng(1234).permutation(
        n_rows
    )  # in file order, t would be tied to the place in the corpus
    t = (np.arange(mc_num)[:, None] + (shuffled[rows] + 0.5) / n_rows) / mc_num
    noise = np.stack(
        [np.random.default_rng([1234, row]).random((mc_num, x0.size(1)), np.float32) for row in rows], axis=1
    )
    draws = []
    for level, uniform in zip(t, noise):
        p_mask = noise_levels(torch.tensor(level[:, None], dtype=torch.float32))
        xt, masked = mask_tokens(x0, p_mask, maskable, model.config.mask_id, torch.from_numpy(uniform))
        with autocast(model.device, dtype):
            draws.append(weighted_nll(model, x0, xt, masked, p_mask))
    return torch.stack(draws).cpu(), t


def mean_and_error(nll, count):
    """Nats per token and the standard error, from the nats (N,) and maskable tokens (N,) of sequences in the order of t.

    The error is estimated from the differences between neighbours in t, which leaves out the spread over t that even spacing
    removes. It takes the texts for different ones: with fewer places in the data than sequences it is too small."""
    mean = nll.sum() / count.sum()
    residual = (nll - mean * count) / count.mean()
    variance = (
        residual - residual.roll(1)
    ).square().mean() / 2  # each counts twice, also the wildest, at t near 0
    error = (variance / len(nll)).sqrt()
    return mean.item(), error.item()


def evaluate(cfg, model, get_batch, rank=0, world_size=1):
    """The bound on -log p(x0) over eval_seqs validation sequences, nats per maskable token: its mean and standard error. One draw
    for each sequence, the same for any number of processes."""
    B, N = cfg.micro_batch_size, cfg.eval_seqs
    sums = torch.zeros(3, N, dtype=torch.float64)
    for index in range(rank, math.ceil(N / B), world_size):
        rows = np.arange(index * B, min(N, (index + 1) * B))
        x0, maskable = (tensor[: len(rows)] for tensor in get_batch("val", index))
        nll, t = validation_nll(model, x0, maskable, rows, N, dtype=cfg.dtype)
        sums[:, rows] = torch.stack((nll[0].double(), maskable.sum(dim=1), torch.from_numpy(t[0])))
    if world_size > 1:
        dist.all_reduce(sums)
    nll, count, t = sums
    order = t.argsort()
    return mean_and_error(nll[order], count[order])


def one_ahead(get_batch, indices):
    """(index, x0, maskable) of training micro-batches. While one is worked on, a thread already makes the next one."""

    def start(index):
        def make():
            try:
                batch.set_result((index, *get_batch("train", index)))
            except BaseException as error:  # raised again where the batch is due
                batch.set_exception(error)

        batch = Future()
        threading.Thread(target=make, daemon=True).start()  # daemon: nobody waits for it at the end
        return batch

    coming = None
    for index in indices:
        batch = coming and coming.result()
        coming = start(index)
        if batch:
            yield batch
    if coming:
        yield coming.result()


def compile_model(model, shape):
    """Makes the model train compiled on texts of this shape (B, T), the many. What is shorter (the last rows of a validation, the
    random lengths) runs as it is, because each new shape would cost a minute. The number of hidden tokens is another every time;
    the output head is compiled for any."""
    model.wte.forward = torch.compiler.disable(
        model.wte.forward
    )  # torch 2.6 on a CPU: wrong gradient where tokens repeat
    plain, compiled = model.hidden_states, torch.compile(model.hidden_states, dynamic=False)
    model.hidden_states = lambda xt, *args, **where: (compiled if xt.shape == shape else plain)(
        xt, *args, **where
    )
    model.nll_of_part = torch.compile(model.nll_of_part, dynamic=True)


def save_checkpoint(path, checkpoint):
    """Under a temporary name first, so that a crash or a full disk never costs the checkpoint that was there."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (
        OSError,
        RuntimeError,
    ) as error:  # in torch.save a full disk ends as a RuntimeError, of one or two others
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        raise ValueError(f"cannot save {path} ({cause}); make room, then --init_from=resume") from error
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


def made_by() -> dict:
    """What made a number, besides settings, weights and data: the commit (with -dirty where files differ from it, None where git
    cannot tell) and the versions of what computes."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        folder = os.path.dirname(os.path.abspath(__file__))
        commit = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


class Reporter:
    """What rank 0 tells: a progress bar in a terminal, plain lines elsewhere, log.jsonl, and wandb if asked."""

    def __init__(self, cfg, start, max_steps, is_resumed, facts):
        os.makedirs(cfg.out_dir, exist_ok=True)
        path = os.path.join(cfg.out_dir, "log.jsonl")
        kept = []
        if is_resumed and os.path.exists(
            path
        ):  # drop what a crashed run logged after the checkpoint we resume from
            try:
                with open(path) as file:
                    kept = [
                        line for line in file if line.endswith("\n") and json.loads(line)["step"] <= start
                    ]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is damaged ({error}); move it away to go on with a new one"
                ) from error
        with open(path + ".tmp", "w") as file:
            file.writelines(kept)
        os.replace(path + ".tmp", path)
        self.file = open(path, "a")
        self.max_steps, self.run = max_steps, None
        self.write({"step": start, "config": asdict(cfg), **facts})
        self.bar = tqdm(
            total=max_steps, initial=start, desc=cfg.out_dir, unit="step", disable=not sys.stderr.isatty()
        )
        if cfg.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("wandb is not installed: pip install wandb, or leave out --wandb") from error
            self.run = wandb.init(project=cfg.wandb, name=os.path.basename(cfg.out_dir), config=asdict(cfg))

    def say(self, text):
        with contextlib.suppress(OSError):  # a terminal or a pipe that is gone; log.jsonl has it all
            self.bar.write(text, file=sys.stdout) if not self.bar.disable else print(text, flush=True)

    def write(self, row):
        try:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        except OSError as error:
            raise ValueError(
                f"cannot write {self.file.name} ({error}); make room, then --init_from=resume"
            ) from error

    def log(self, step, seconds_left=None, **metrics):
        self.write({"step": step, **metrics})
        if self.run:
            self.run.log(metrics, step=step)
        place = f"step {step:>6}/{self.max_steps}"
        if "val_loss" in metrics:
            self.say(f"{place}  val loss {metrics['val_loss']:.4f} ± {metrics['val_se']:.4f}")
        elif self.bar.disable:
            left = tqdm.format_interval(seconds_left)
            mfu = f"  mfu {metrics['mfu']:.1%}" if metrics.get("mfu") else ""
            self.say(
                f"{place}  loss {metrics['loss']:.4f}  {metrics['tokens_per_s']:,.0f} tokens/s{mfu}  {left} left"
            )
        else:
            self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tok/s")

    def close(self):
        self.bar.close()
        self.file.close()
        if self.run:
            self.run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def train(cfg: TrainConfig, model: MDM, get_batch, meta=None, resume=None) -> MDM:
    """Trains model in place, and returns it. Pretraining and fine-tuning differ only in get_batch.

    get_batch(split, index) -> x0, maskable: both (micro_batch_size, T) on the CPU, split 'train' or 'val'; index names the
               micro-batch. A thread calls it ahead of time: what is random in it must come from a generator of its own
    meta       the data set's meta.json, kept in the checkpoints
    resume     a checkpoint dict to go on from: its optimizer state and step are taken up (its weights are in model already)

    Writes out_dir/ckpt.pt (the latest), best.pt (lowest validation loss) and log.jsonl. SIGTERM, SIGHUP or Ctrl-C finishes the step
    and saves; then train returns, but after Ctrl-C it raises KeyboardInterrupt. A second Ctrl-C, half a second later or more, does
    so at once.
    Raises ValueError if batch_size does not divide, or if a loss or gradient is not finite: before the step is made."""
    rank, world_size, device = setup_distributed(cfg.device)
    per_pass = cfg.micro_batch_size * world_size
    if cfg.batch_size % per_pass:
        product = f"micro_batch_size {cfg.micro_batch_size} x {world_size} processes = {per_pass}"
        raise ValueError(f"batch_size {cfg.batch_size} is not a multiple of {product}; change one of them")
    grad_accum = cfg.batch_size // per_pass
    step_tokens = cfg.batch_size * cfg.block_size
    max_steps = cfg.max_steps
    if cfg.train_flops is not None:
        max_steps = int(tokens_for_flops(model.config, cfg.train_flops) / step_tokens)
    if resume is not None and max_steps < resume["step"]:
        raise ValueError(
            f"{max_steps} steps, but the run to resume has made {resume['step']}; raise max_steps"
        )
    warmup_steps = round(cfg.warmup * max_steps)

    model.to(device)
    if cfg.compile:
        compile_model(model, (cfg.micro_batch_size, cfg.block_size))
    ddp = model
    if world_size > 1:
        device_ids = [device.index] if device.type == "cuda" else None
        ddp = DistributedDataParallel(
            model, device_ids=device_ids, broadcast_buffers=False
        )  # the rotations are the same anywhere
    options = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    optimizer = torch.optim.AdamW(
        model.parameters(), **options, fused=device.type in ("cuda", "cpu")
    )  # every tensor decays
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "float16")
    start, best_val_loss = 0, math.inf
    losses = []  # of the steps since the last log line, the mean of each over all its micro-batches
    if resume is not None:
        optimizer.load_state_dict(resume["optimizer"])
        scaler.load_state_dict(resume["scaler"])
        start, best_val_loss, losses = (
            resume["step"],
            resume["best_val_loss"],
            resume.get("losses", []),
        )  # older ones lack them
    peak = peak_flops(device)

    report = None
    if rank == 0:
        facts = {
            **made_by(),
            "data_sha256": meta and meta["sha256"],
            "device": str(device),
            "processes": world_size,
        }
        report = Reporter(cfg, start, max_steps, resume is not None, facts)
        sizes = f"{model.num_params(non_embedding=False):,} parameters ({model.num_params():,} non-embedding)"
        batch = f"a step is {grad_accum} x {world_size} x {cfg.micro_batch_size} sequences of {cfg.block_size} tokens"
        report.say(
            f"{sizes} on {world_size} x {device}; {batch}; {max_steps:,} steps = {max_steps * step_tokens:,} tokens"
        )

    def save(name, step):
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "model_config": asdict(model.config),
            "run_config": asdict(cfg),
            "meta": meta,
            "step": step,
            "best_val_loss": best_val_loss,
            "losses": losses,
        }
        save_checkpoint(os.path.join(cfg.out_dir, name), checkpoint)

    received = {}  # signal: when it came

    def receive(signum, frame):
        # what started us may pass a Ctrl-C on that we have got from the terminal, too: one is not two
        if signum == signal.SIGINT and signum in received and time.monotonic() - received[signum] > 0.5:
            raise KeyboardInterrupt
        received.setdefault(signum, time.monotonic())

    handlers = {}
    for signum in (
        signal.SIGINT,
        signal.SIGTERM,
        getattr(signal, "SIGHUP", signal.SIGTERM),
    ):  # SIGHUP: a terminal that is gone
        if signal.getsignal(signum) not in (signal.SIG_IGN, receive):  # nohup's wish
            handlers[signum] = signal.signal(signum, receive)
    stop = ctrl_c = False
    log_time, log_step = time.time(), start
    micros = range(start * grad_accum, max_steps * grad_accum)
    batches = one_ahead(get_batch, (micro * world_size + rank for micro in micros))
    try:
        for step in range(start, max_steps + 1):
            last_step = step == max_steps
            if stop and rank == 0:  # before a validation, which may take longer than there is time
                save("ckpt.pt", step)
            if (last_step or step % cfg.eval_interval == 0) and not (resume and step == start):
                eval_time = time.time()
                val_loss, val_se = evaluate(cfg, model, get_batch, rank, world_size)
                if not math.isfinite(val_loss):  # before it is saved
                    raise ValueError(
                        f"the validation loss is {val_loss} at step {step}; lower learning_rate or use bfloat16"
                    )
                is_best = val_loss < best_val_loss
                best_val_loss = min(best_val_loss, val_loss)
                if rank == 0:
                    report.log(step, val_loss=val_loss, val_se=val_se)
                    if is_best:
                        save("best.pt", step)
                    save("ckpt.pt", step)
                log_time += time.time() - eval_time  # not counted in tokens/s
            if last_step or stop:
                break

            # ---- one optimizer step; its number in the schedule is step + 1, so that the first one moves and the last is at min_lr
            lr = get_lr(step + 1, max_steps, cfg.learning_rate, cfg.min_lr, warmup_steps)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            micro_losses, indices = [], []
            for micro in range(grad_accum):
                index, x0, maskable = next(batches)
                torch.manual_seed(seed_for(cfg.seed, index))  # the masks, and dropout if you add some
                syncs_now = world_size == 1 or micro == grad_accum - 1
                with contextlib.nullcontext() if syncs_now else ddp.no_sync():
                    with autocast(device, cfg.dtype):
                        loss = diffusion_loss(ddp, x0, maskable, cfg.stratified_t, cfg.random_length)
                    scaler.scale(loss / grad_accum).backward()
                micro_losses.append(loss.detach())
                indices.append(index)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)

            # ---- what all processes must know of the step; here each waits for its GPU
            *micro_losses, grad_norm = torch.stack([*micro_losses, grad_norm]).tolist()
            shared = torch.tensor(
                [sum(micro_losses), len(received), signal.SIGINT in received], dtype=torch.float64
            )
            if world_size > 1:
                dist.all_reduce(shared)
            loss_sum, stop, ctrl_c = shared.tolist()
            # before it reaches the weights; float16's GradScaler leaves out a step whose gradient overflows, and lowers its scale
            overflows = scaler.is_enabled() and scaler.get_scale() >= 1
            if not math.isfinite(loss_sum) or not (math.isfinite(grad_norm) or overflows):
                what = name_failure(dict(zip(indices, micro_losses)), grad_norm, world_size)
                raise ValueError(
                    f"step {step + 1}: {what}; the step was not made. --init_from=resume repeats it; "
                    f"--init_from={os.path.join(cfg.out_dir, 'ckpt.pt')} is a new run from the weights before it, which may have a "
                    f"lower learning_rate (now {lr:.2e}). Micro-batch i and its masks: get_batch('train', i) and diffusion_loss "
                    f"after torch.manual_seed(seed_for({cfg.seed}, i))"
                )
            losses.append(loss_sum / grad_accum / world_size)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # ---- the rest is reporting
            done = step + 1
            if rank == 0:
                report.bar.update(1)
            if done % cfg.log_interval == 0 or done == max_steps:
                seconds = time.time() - log_time
                tokens_per_s = (done - log_step) * step_tokens / seconds
                mfu = (
                    model.flops_per_token(cfg.block_size) * tokens_per_s / world_size / peak if peak else None
                )
                if rank == 0:
                    seconds_left = (max_steps - done) * seconds / (done - log_step)
                    report.log(
                        done, seconds_left, loss=sum(losses) / len(losses), lr=lr,
                        grad_norm=grad_norm if math.isfinite(grad_norm) else None, tokens=done * step_tokens,
                        tokens_per_s=tokens_per_s, mfu=mfu,
                    )  # fmt: skip
                losses = []
                log_time, log_step = time.time(), done
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if report:
            report.close()
    if rank == 0:
        resume_hint = f"; go on with --init_from=resume --out_dir={cfg.out_dir}" if step < max_steps else ""
        print(
            f"stopped at step {step} of {max_steps}; {os.path.join(cfg.out_dir, 'ckpt.pt')} is saved{resume_hint}"
        )
    if ctrl_c:
        close_distributed()
        raise KeyboardInterrupt
    return model


def name_failure(losses, grad_norm, world_size):
    """Which micro-batch of a step has a loss {index: loss} that is not finite, on whichever process; or that all are, but not the
    gradient."""
    if world_size > 1:
        parts = [None] * world_size
        dist.all_gather_object(parts, losses)
        losses = {index: loss for part in parts for index, loss in part.items()}
    for index in sorted(losses):
        if not math.isfinite(losses[index]):
            return f"the loss of micro-batch {index} is {losses[index]}"
    return f"the gradient's norm is {grad_norm}, the losses of micro-batches {min(losses)} to {max(losses)} are finite"


# ---------------------------------------------------------------------------------------------------------------------
# Start: from scratch, resumed, or from the weights of a checkpoint


def settle(cfg: TrainConfig, set_by: dict):
    """(cfg, checkpoint or None) with what init_from, preset and a set length imply; set_by learns where it comes from.
    Raises ValueError where settings contradict each other or what is there."""
    if cfg.preset is not None:
        shape = MDMConfig.preset(cfg.preset)
        sizes = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "mlp_hidden")}
        refuse(cfg, set_by, sizes, f"preset {cfg.preset}")
        cfg = dataclasses.replace(cfg, **sizes)
        set_by.update({key: f"preset {cfg.preset}" for key in sizes})
    lengths = [key for key in LENGTH_KEYS if key in set_by and getattr(cfg, key) is not None]
    lengths = [
        key for key in lengths if set_by[key] == "command line"
    ] or lengths  # --max_steps=9 beats epochs of a file
    if len(lengths) > 1:
        places = " and ".join(f"{key} ({set_by[key]})" for key in lengths)
        raise ValueError(f"{places} all set the length; keep one, and set the others to None")
    if lengths:  # the others, by default or from a checkpoint, no longer count
        cfg = dataclasses.replace(
            cfg, **{key: None for key in LENGTH_KEYS if key != lengths[0] and hasattr(cfg, key)}
        )
    own = os.path.join(cfg.out_dir, "ckpt.pt")
    if cfg.init_from != "resume" and os.path.exists(own):
        raise ValueError(f"{own} exists; go on with --init_from=resume, or choose another --out_dir")
    checkpoint = None
    if cfg.init_from != "scratch":
        path = own if cfg.init_from == "resume" else cfg.init_from
        checkpoint = load_checkpoint(path)
        if cfg.init_from == "resume":
            saved = checkpoint["run_config"]
            if saved.keys() != asdict(cfg).keys():
                raise ValueError(
                    f"{path} has other settings than this script: resume it with the script and version that made it"
                )
            settable = [*set_by, *(LENGTH_KEYS if lengths else [])]
            saved = {
                key: value for key, value in saved.items() if key not in RESUME_KEYS or key not in settable
            }
            saved.update(out_dir=cfg.out_dir, init_from="resume")
        else:  # weights only: the architecture is the checkpoint's; length of a sequence and way to compute have no weights
            free = [key for key in ("block_size", "sink_attention") if key in set_by]
            saved = {key: checkpoint["model_config"][key] for key in MODEL_KEYS if key not in free}
        refuse(cfg, set_by, saved, path)
        cfg = dataclasses.replace(cfg, **saved)
        set_by.update({key: path for key in saved if key not in set_by})
    return cfg, checkpoint


def start_model(cfg: TrainConfig, checkpoint, meta: dict) -> MDM:
    """The model of settled settings. Raises ValueError if the checkpoint was made with other data than meta's."""
    if checkpoint is None:
        torch.manual_seed(cfg.seed)
        return MDM(MDMConfig(vocab_size=meta["vocab_size"], **{key: getattr(cfg, key) for key in MODEL_KEYS}))
    trained_on = checkpoint["meta"]
    if trained_on and vocabulary(trained_on) != vocabulary(meta):
        there, here = (f"{m['tokenizer']['name']} of {m['vocab_size']:,} tokens" for m in (trained_on, meta))
        what = f"the checkpoint has another vocabulary ({there}) than data set {cfg.dataset} ({here})"
        raise ValueError(f"{what}; prepare the data anew")
    tokens_of = lambda some: [some["sha256"].get(split) for split in ("train", "val")]  # noqa: E731
    if trained_on and cfg.init_from == "resume" and tokens_of(trained_on) != tokens_of(meta):
        raise ValueError(
            f"cannot resume: data set {cfg.dataset} has other tokens now than when the checkpoint was saved"
        )
    checkpoint["model_config"].update(block_size=cfg.block_size, sink_attention=cfg.sink_attention)
    return MDM.from_checkpoint(checkpoint)


def refuse(cfg, set_by, fixed, place):
    """ValueError if a key that was set contradicts one that is fixed by a checkpoint or a preset."""
    clash = [key for key in fixed if key in set_by and getattr(cfg, key) != fixed[key]]
    if clash:
        details = "; ".join(
            f"{key}={getattr(cfg, key)!r} ({set_by[key]}), not {fixed[key]!r}" for key in clash
        )
        raise ValueError(f"settings contradict {place}: {details}; leave them out")


def vocabulary(meta):
    """What must agree between a checkpoint and its data; the split pattern may differ."""
    return {key: value for key, value in meta["tokenizer"].items() if key != "pattern"}


def main():
    cfg, set_by = configurator.parse(TrainConfig)
    cfg, checkpoint = settle(cfg, set_by)
    rank, _, _ = setup_distributed(cfg.device)
    if rank == 0:
        print(configurator.describe(cfg, set_by))
    folder = os.path.join(cfg.data_dir, cfg.dataset)
    meta = load_meta(folder)
    get_batch = token_batches(folder, meta, cfg)
    model = start_model(cfg, checkpoint, meta)
    train(cfg, model, get_batch, meta, checkpoint if cfg.init_from == "resume" else None)
    close_distributed()


if __name__ == "__main__":
    configurator.run(main)
