"""Trains a masked diffusion language model, on a laptop or on many GPUs.

    python train.py                                                        # arithmetic, minutes on a CPU
    torchrun --standalone --nproc_per_node=8 train.py config/pretrain_472m.py
    python train.py --init_from=resume --out_dir=out/arithmetic            # continues where it stopped

Data and masks of a micro-batch follow from (seed, index), its number in the run: a resumed run continues
exactly, two processes do the work of one, variants see the same masked texts. Tasks differ in get_batch."""

import atexit
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configurator
from model import MDM, MDMConfig, diffusion_loss, load_checkpoint, nll_at, seed_for
from prepare_data import load_meta

MAY_CHANGE = {"data_dir", "max_steps", "train_flops", "eval_interval", "log_interval", "keep_all", "wandb"}
MAY_CHANGE |= {"device", "compile", "sink_attention"}  # in a resumed run, which keeps the other settings


@dataclass
class TrainConfig:
    dataset: str = "arithmetic"  # trains on data_dir/dataset, made by prepare_data.py
    data_dir: str = "data"  # where the data sets are
    out_dir: str | None = None  # checkpoints and log.jsonl go here; None: out/dataset
    init_from: str = "scratch"  # scratch, resume (out_dir), auto (resume or scratch), or a checkpoint
    seed: int = 0  # of weights, batches and masks
    preset: str | None = None  # a size of model.py's table, such as 34M, instead of the next four keys
    n_layer: int = 3  # transformer blocks
    n_head: int = 4  # attention heads
    n_embd: int = 96  # width of the residual stream
    mlp_hidden: int | None = None  # hidden width of the MLP; None: 4 * n_embd
    block_size: int = 64  # tokens of a sequence, sinks not counted
    n_sink: int = 1  # sink tokens: 0 = vanilla MDM, 1 = the paper's, 2 and 4 its ablation
    sink_position: str = "front"  # rotary positions of the sinks: front or end
    sink_zero_value: bool = False  # force the sinks' value vectors to zero
    sink_attends_all: bool = False  # the sinks attend to all tokens: registers
    gated_attention: bool = False  # the gated-attention baseline
    sink_attention: str = "mask"  # mask: Eq. 5-6 literally; split: the same without a mask, for fast kernels
    batch_size: int = 16  # sequences per optimizer step, over all processes
    micro_batch_size: int = 16  # sequences per process and forward pass; the rest is gradient accumulation
    max_steps: int = 4000  # optimizer steps
    train_flops: float | None = None  # goes before max_steps: train until C = 6 N D, as the authors' --flops
    stratified_t: bool = False  # spread the noise levels of a micro-batch evenly (the authors: independent)
    random_length: float = 0.0  # share of micro-batches cut to a random length (SMDM: 0.01)
    learning_rate: float = 1e-3  # peak, after warm-up
    min_lr: float | None = None  # at the end of the cosine; None: a tenth of learning_rate
    warmup: float = 0.01  # share of the steps with a linearly rising rate
    weight_decay: float = 0.1  # on every tensor, norms and embeddings included, as the authors do
    beta1: float = 0.9  # decay of the mean of the gradients
    beta2: float = 0.95  # decay of the mean of their squares
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    eval_interval: int = 500  # steps between validations, each of which saves a checkpoint
    keep_all: bool = False  # also keep the checkpoint of each validation, as STEP.pt
    eval_seqs: int = 512  # validation sequences, with fixed masks
    log_interval: int = 100  # steps between log lines; the loss is the mean over these steps
    wandb: str | None = None  # project name: also log to Weights & Biases
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where a GPU has it
    compile: bool = False  # torch.compile: a minute at the start, then faster steps

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.dataset}"
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        at_least_1 = ("block_size", "batch_size", "micro_batch_size", "eval_interval", "log_interval")
        least = dict.fromkeys(at_least_1, 1) | {"seed": 0, "eval_seqs": 2, "grad_clip": 0}
        for name, number in (least | {"learning_rate": self.min_lr}).items():
            if getattr(self, name) < number:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {number}")


# settings of a run; the other fields of MDMConfig come from the data, or from a converted model
MODEL_KEYS = [field.name for field in fields(MDMConfig) if hasattr(TrainConfig, field.name)]


def token_batches(folder, meta, cfg):
    """get_batch for pretraining: all tokens are maskable. A training text starts at a random token, or, if
    documents are one a line, at a random end-of-text. Validation takes eval_seqs texts."""
    B, T = cfg.micro_batch_size, cfg.block_size
    data = {}
    for split in ("train", "val"):
        tokens = np.memmap(os.path.join(folder, f"{split}.bin"), meta["dtype"], mode="r")
        starts = range(len(tokens) - T + 1)
        if meta["one_per_line"]:  # at the end-of-text before a problem
            ends = np.load(os.path.join(folder, f"{split}_cuts.npy"))[:, 3]
            starts = ends[ends + T - 1 <= len(tokens)] - 1
        if len(starts) == 0:
            raise ValueError(f"{folder}/{split}.bin is too short for block_size {T}; lower block_size")
        data[split] = tokens, starts

    def get_batch(split, index):
        tokens, starts = data[split]
        if split == "train":
            chosen = np.random.default_rng([cfg.seed, index]).integers(len(starts), size=B)
        else:  # spread evenly
            chosen = np.arange(index * B, (index + 1) * B) * len(starts) // cfg.eval_seqs % len(starts)
        x0 = np.stack([tokens[starts[i] :][:T] for i in chosen]).astype(np.int64)
        return torch.from_numpy(x0), torch.ones(B, T, dtype=torch.bool)

    return get_batch


def setup_distributed(device: str = "auto"):
    """(rank, world_size, device) of this process. Joins the processes that torchrun started, if it did."""
    distributed = "RANK" in os.environ
    if device == "auto":
        has_mps = torch.backends.mps.is_available() and not distributed  # it has no process groups
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        if device == "cuda" and distributed:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)  # before any other call, or every process takes memory of GPU 0
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32 on a GPU
    if not distributed:
        return 0, 1, torch.device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def autocast(device, dtype: str):
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it must be auto, float32 or bfloat16")
    auto = dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(False)  # not emulated
    return torch.autocast(device.type, torch.bfloat16, enabled=auto or dtype == "bfloat16")


def flops_utilization(model, T, tokens_per_s):
    """Share of a GPU's dense bfloat16 peak (data sheets), 0 if it is unknown. FLOPs per token (PaLM, app. B):
    6 a weight, 3 of the head, as half of the tokens are hidden, and 12 * n_layer * n_embd * T."""
    peaks = {"B200": 2250, "H[12]00": 989, "H[12]00 NVL": 835, "H100 PCIe": 756, "A100": 312}  # TFLOP/s
    peaks |= {"L40S": 362, "RTX 4090$": 165}  # the last that fits whole words of the GPU's name counts
    config, head = model.config, model.lm_head.weight
    name = torch.cuda.get_device_name(head.device) if head.is_cuda else ""
    fits = [1e12 * peak for key, peak in peaks.items() if re.search(rf"\b{key}\b(?!.*MIG)", name)]
    flops = 6 * (model.num_params() + head.numel() / 2) + 12 * config.n_layer * config.n_embd * T
    return flops * tokens_per_s / fits[-1] if fits else 0.0


def made_by() -> dict:
    """What made a number besides settings, weights and data: the commit, if there is one, and torch."""
    git, folder = "git describe --always --dirty --exclude=*", os.path.dirname(os.path.abspath(__file__))
    run = subprocess.run(git, shell=True, cwd=folder, capture_output=True, text=True)
    return {"commit": run.stdout.strip() or None, "torch": torch.__version__}


def write_file(path, write):
    """write(file) under a temporary name, flushed, then renamed: a crash or full disk keeps the old file."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ValueError(f"cannot write {path} ({error}); make room, or choose another place") from error


def whole_lines(file):
    """The bytes of a file that runs append to. A crash may have cut off its last line: that is removed."""
    file.seek(0)
    text = file.read()
    size = text.rfind(b"\n") + 1
    file.truncate(size)
    return text[:size]


def open_locked(path):
    """path, opened to append behind its last whole line, and locked until it is closed. Raises ValueError if
    another run holds the lock. Opening and closing path once more in the same process ends the lock."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "a+", encoding="utf-8")
    try:
        if hasattr(os, "lockf"):  # not on Windows
            os.lockf(file.fileno(), os.F_TLOCK, 0)
    except OSError as error:
        raise ValueError(f"{path} is locked by another run ({error}); wait, or set another folder") from error
    whole_lines(file.buffer)
    return file


def get_lr(step, max_steps, peak, floor, warmup_steps):
    """Linear from 0 to peak over warmup_steps, then half a cosine down to floor at max_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def spread_levels(n):
    """n noise levels t, (n,) float64: the midpoints of n equal parts of (0, 1), so that their mean is 1/2, in
    the order of the golden ratio, so that any run of texts in a row has high, middle and low ones."""
    golden = torch.arange(n, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 % 1
    return (golden.argsort().argsort().double() + 0.5) / n


@torch.no_grad()
def validate(model, get_batch, B, n_seqs, dtype="auto", mc_num=1, rank=0, world_size=1):
    """The bound on -log p of n_seqs validation texts: nats per maskable token, its standard error, nats and
    tokens of each text. get_batch makes B at once. A text has fixed noise and mc_num evenly spread levels."""
    device = next(model.parameters()).device
    t = spread_levels(n_seqs) / mc_num
    sums = torch.zeros(2, n_seqs, dtype=torch.float64)  # nats, tokens
    for index in range(rank, math.ceil(n_seqs / B), world_size):
        rows = range(index * B, min(n_seqs, (index + 1) * B))
        x0, maskable = (tensor[: len(rows)] for tensor in get_batch("val", index))
        sums[1, rows] = maskable.sum(dim=1).double()
        for draw in range(mc_num):
            streams = [torch.Generator().manual_seed(seed_for(1234, row, draw)) for row in rows]
            noise = torch.stack([torch.rand(x0.size(1), generator=stream) for stream in streams])
            with autocast(device, dtype):
                nll = nll_at(model, x0, maskable, t[rows, None] + draw / mc_num, noise)
            sums[0, rows] += nll.cpu() / mc_num
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    return *bound_and_error(*sums.cpu(), t), *sums.cpu()


def bound_and_error(nats, tokens, t):
    """Nats per token and its standard error, from nats and tokens (N,) of texts at noise levels t (N,). The
    levels are not random. Neighbours have nearly the same t, so the error comes from their differences; the
    first and the last text have one neighbour, so those differences count twice. Each half of the texts is
    taken alone: in fine-tuning the halves are the two stages."""
    mean, squares = nats.sum() / tokens.sum(), []
    residuals = (nats - mean * tokens) / tokens.mean()
    for half in torch.arange(len(t)).tensor_split(2 if len(t) > 3 else 1):
        differences = residuals[half][t[half].argsort()].diff().square()
        squares += [differences, differences[:1], differences[-1:]]
    variance = torch.cat(squares).mean() / 2
    return mean.item(), (variance / len(t)).sqrt().item()


def train(cfg: TrainConfig, model: MDM, get_batch, meta=None, resume=None) -> MDM:
    """Trains model in place on get_batch(split, index) -> x0, maskable: (micro_batch_size, T) on the CPU.
    Writes ckpt.pt (with meta), best.pt (lowest validation loss), log.jsonl. resume: model's own checkpoint.
    Ctrl-C or SIGTERM ends the step, saves, exits with 128 + signal; a second Ctrl-C exits at once."""
    # ---- set up: how much work, on what
    rank, world_size, device = setup_distributed(cfg.device)
    B, T, max_steps = cfg.micro_batch_size, cfg.block_size, cfg.max_steps
    precision = autocast(device, cfg.dtype)
    grad_accum, step_tokens = cfg.batch_size // (B * world_size), cfg.batch_size * T
    if cfg.batch_size % (B * world_size):
        wanted = f"micro_batch_size {B} x {world_size} processes"
        raise ValueError(f"batch_size {cfg.batch_size} is not a multiple of {wanted}; change one of them")
    if cfg.train_flops is not None:  # C = 6 N D with the N of the table, for every arm the same
        max_steps = int(cfg.train_flops / (6 * model.config.table_params() * step_tokens))
    start, best_val_loss, losses = 0, math.inf, []
    if resume:
        start, best_val_loss, losses = resume["step"], resume["best_val_loss"], resume["losses"]
    if start > max_steps:
        raise ValueError(f"the run to resume has made {start} steps, but max_steps is {max_steps}; raise it")
    # ---- set up: model and optimizer
    model.to(device)
    if cfg.compile:
        # only for whole micro-batches: a shorter text would compile one more
        trunk, compiled = model.trunk, torch.compile(model.trunk, dynamic=False)
        model.trunk = lambda xt: compiled(xt) if xt.shape == (B, T) else trunk(xt)
        model.nll = torch.compile(model.nll, dynamic=True)  # another number of tokens each time
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size > 1 else model
    ddp.config = model.config  # which DDP hides, and the loss needs
    options = {"betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **options, fused=device.type in ("cuda", "cpu"))
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
    # ---- set up: logs, checkpoints, signals
    log_path = os.path.join(cfg.out_dir, "log.jsonl")
    log_file = open_locked(log_path) if rank == 0 else None
    if rank == 0 and not resume and (rows := whole_lines(log_file.buffer)):
        with open(f"{log_path}.old", "ab") as file:
            file.write(rows)  # of a start that saved no checkpoint
        log_file.truncate(0)
    bar = tqdm(total=max_steps, initial=start, desc=cfg.out_dir, disable=rank > 0 or None)  # None: on a tty
    wandb = None
    if cfg.wandb and rank == 0:
        run = {"project": cfg.wandb, "name": cfg.out_dir, "id": resume and resume["wandb_id"]}
        wandb = configurator.need("wandb").init(**run, resume="allow", config=asdict(cfg))

    def log(line, **row):  # a resumed run may log a step again: its last row counts
        if rank == 0:
            bar.write(f"step {row['step']:>6}/{max_steps}  {line}")
            print(json.dumps(row), file=log_file, flush=True)
        if wandb:
            wandb.log(row, step=row["step"])

    def save(name):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state |= {"best_val_loss": best_val_loss, "losses": losses, "wandb_id": wandb and wandb.id}
        state |= {"model_config": asdict(model.config), "run_config": asdict(cfg), "meta": meta}
        if rank == 0:
            write_file(os.path.join(cfg.out_dir, name), lambda file: torch.save(state, file))

    def request_stop(signum, frame):
        nonlocal stop_signal
        stop_signal = signum
        if world_size == 1:  # torchrun repeats a Ctrl-C, which its processes have got already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    stop = stop_signal = 0
    handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    size = f"{model.num_params(False):,} parameters; a step is {grad_accum} x {world_size} x {B} x {T} tokens"
    facts = made_by() | {"config": asdict(cfg), "data_sha256": meta and meta["sha256"], "device": str(device)}
    log(f"{size} on {device}, {torch.get_num_threads()} threads", step=start, processes=world_size, **facts)
    index = start * grad_accum * world_size + rank  # of the micro-batch in the whole run
    x0, maskable = get_batch("train", index)
    log_time, log_step = time.perf_counter(), start
    for step in range(start, max_steps + 1):
        # ---- validate and save
        if stop:  # without a validation that is due: there may be no time for it
            save("ckpt.pt")
            if rank == 0:
                bar.write(f"stopped at step {step}; continue with --init_from=resume --out_dir={cfg.out_dir}")
            break
        if step % cfg.eval_interval == 0 or step == max_steps:
            bound, se, *_ = validate(model, get_batch, B, cfg.eval_seqs, cfg.dtype, 1, rank, world_size)
            log(f"val loss {bound:.4f} ± {se:.4f}", step=step, val_loss=bound, val_se=se)
            is_best = bound <= best_val_loss
            best_val_loss = min(bound, best_val_loss)
            save("ckpt.pt")  # first: a run that is killed here can be resumed
            if is_best:
                save("best.pt")
            if cfg.keep_all:
                save(f"{step}.pt")
            log_time, log_step = time.perf_counter(), step  # a validation does not count in tokens/s
        if step == max_steps:
            break
        # ---- one optimizer step
        lr = get_lr(step + 1, max_steps, cfg.learning_rate, cfg.min_lr, round(cfg.warmup * max_steps))
        optimizer.param_groups[0]["lr"] = lr
        stats = torch.zeros(3, device=device)  # loss, gradient norm, stop
        for micro in range(grad_accum):
            ddp.require_backward_grad_sync = micro == grad_accum - 1  # processes add up gradients once
            torch.manual_seed(seed_for(cfg.seed, index))  # the masks
            with precision:
                loss = diffusion_loss(ddp, x0, maskable, cfg.stratified_t, cfg.random_length) / grad_accum
            index += world_size
            x0, maskable = get_batch("train", index)  # the next one, while a GPU works on this one
            loss.backward()
            stats[0] += loss.detach()
        stats[1] = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
        stats[2] = stop_signal
        if world_size > 1:
            dist.all_reduce(stats)
        loss, grad_norm, stop = (stats / world_size).tolist()  # here the CPU waits for the GPU
        if not math.isfinite(loss + grad_norm):
            problem = f"step {step + 1} was not made: its loss is {loss}, the gradient's norm {grad_norm}"
            raise ValueError(f"{problem}; start a new run with a lower learning_rate (now {lr:.1e})")
        optimizer.step()
        optimizer.zero_grad()
        # ---- report
        losses.append(loss)
        bar.update(1)
        done = step + 1
        if done % cfg.log_interval == 0 or done == max_steps:
            speed = (done - log_step) * step_tokens / (time.perf_counter() - log_time)
            remaining = tqdm.format_interval((max_steps - done) * step_tokens / speed)
            mfu = flops_utilization(model, T, speed / world_size)
            row = {"loss": sum(losses) / len(losses), "lr": lr, "grad_norm": grad_norm, "mfu": mfu}
            line = f"loss {row['loss']:.4f}  {speed:,.0f} tokens/s  {remaining} left"
            line += f"  mfu {mfu:.1%}" if mfu else ""
            log(line, step=done, tokens=done * step_tokens, tokens_per_s=speed, **row)
            losses, log_time, log_step = [], time.perf_counter(), done
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    bar.close()
    if wandb:
        wandb.finish()  # before a stopped run exits, or its exit code would mark it as failed
    if stop:
        sys.exit(128 + (stop_signal or signal.SIGTERM))
    return model


def take(cfg, set_by, settings, source, free=()):
    """cfg and set_by with the settings of source, a preset or a checkpoint, where none was set. Raises
    ValueError if one was set to another value and is not free to change."""
    for key in set_by:
        if key in settings and key not in free and getattr(cfg, key) != settings[key]:
            setting = f"{key}={getattr(cfg, key)!r} ({set_by[key]})"
            raise ValueError(f"{setting} contradicts {source}, which has {settings[key]!r}; leave it out")
    taken = {key: value for key, value in settings.items() if key not in set_by}
    return replace(cfg, **taken), set_by | dict.fromkeys(taken, source)


def start_run(cfg: TrainConfig, set_by: dict):
    """(cfg, meta, model, checkpoint to resume or None), as init_from and preset want. set_by: {key: where it
    was set}; other keys give way to them. Raises ValueError where settings, checkpoint, data and out_dir
    contradict each other."""
    if cfg.init_from == "auto":
        has_checkpoint = os.path.exists(os.path.join(cfg.out_dir, "ckpt.pt"))
        cfg = replace(cfg, init_from="resume" if has_checkpoint else "scratch")
    resumes, saved = cfg.init_from == "resume", None
    for path in (os.path.join(cfg.out_dir, name) for name in ("ckpt.pt", "best.pt")):
        if os.path.exists(path) and not resumes:
            raise ValueError(f"{path} exists; continue with --init_from=resume, or set another --out_dir")
    # ---- settings of the preset and of the checkpoint
    if cfg.preset is not None:
        shape = asdict(MDMConfig.preset(cfg.preset))
        shape = {key: shape[key] for key in ("n_layer", "n_head", "n_embd", "mlp_hidden")}
        cfg, set_by = take(cfg, set_by, shape, f"preset {cfg.preset}")
    if cfg.init_from != "scratch":
        path = cfg.out_dir if resumes else cfg.init_from
        saved = load_checkpoint(path)
        if not saved["meta"]:
            raise ValueError(f"{path} has no tokenizer; convert it again with --tokenizer")
        model_config = asdict(MDMConfig(**saved["model_config"]))
        if resumes:
            settings, free = saved["run_config"] | {"out_dir": cfg.out_dir, "init_from": "resume"}, MAY_CHANGE
            if "optimizer" not in saved or settings.keys() != asdict(cfg).keys():
                why = "it has weights alone, or another script or version made it"
                raise ValueError(f"cannot resume {path}: {why}; start a new run: --init_from={path}")
        else:
            settings, free = {key: model_config[key] for key in MODEL_KEYS}, {"block_size", "sink_attention"}
            if model_config["n_sink"] == 0:  # a model without a sink may be given one
                free |= {"n_sink", "sink_position", "sink_zero_value", "sink_attends_all"}
        cfg, set_by = take(cfg, set_by, settings, path, free)
    if setup_distributed(cfg.device)[0] == 0:
        print(configurator.describe(cfg, set_by))
    # ---- data and model
    meta = load_meta(os.path.join(cfg.data_dir, cfg.dataset))
    shape = {key: getattr(cfg, key) for key in MODEL_KEYS}
    if saved is None:
        return cfg, meta, MDM(MDMConfig(vocab_size=meta["vocab_size"], **shape), cfg.seed), None
    old, new = model_config["vocab_size"], meta["vocab_size"]
    if old != new or saved["meta"]["tokenizer"] | {"pattern": None} != meta["tokenizer"] | {"pattern": None}:
        raise ValueError(f"{path} and {cfg.dataset} have different vocabularies ({old:,} and {new:,} tokens)")
    if resumes and saved["meta"]["sha256"] != meta["sha256"]:
        raise ValueError(f"cannot resume: {cfg.dataset} has other tokens than when {path} was saved")
    if cfg.n_sink and "sink" not in saved["model"]:
        print(f"{path} has no sink token: it gets {cfg.n_sink}, with the embedding of end-of-text")
        saved["model"]["sink"] = saved["model"]["wte.weight"][meta["eot_id"]].repeat(cfg.n_sink, 1)
    model = MDM.from_checkpoint(saved | {"model_config": model_config | shape})
    return cfg, meta, model, saved if resumes else None


def main():
    cfg, meta, model, resume = start_run(*configurator.parse(TrainConfig))
    train(cfg, model, token_batches(os.path.join(cfg.data_dir, cfg.dataset), meta, cfg), meta, resume)


if __name__ == "__main__":
    configurator.run(main)
