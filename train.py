"""Trains a masked diffusion language model, on a laptop or on many GPUs.

    python train.py                                                        # arithmetic, minutes on a CPU
    python train.py config/shakespeare.py --n_sink=0 --out_dir=out/shakespeare-vanilla
    torchrun --standalone --nproc_per_node=8 train.py config/pretrain_472m_sink.py
    python train.py --init_from=resume --out_dir=out/arithmetic            # continues where it stopped

Whatever is random in a micro-batch follows from (seed, index), where index numbers the micro-batches of the
run. So a resumed run continues exactly, two processes do the work of one, and two variants see the same texts
with the same masks. `train` is the one loop; get_batch(split, index) is all that a task adds.
"""

import atexit
import json
import math
import os
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
from model import MDM, MDMConfig, diffusion_loss, load_checkpoint, mask_tokens, noise_levels, seed_for

from model import weighted_nll  # isort: skip


@dataclass
class TrainConfig:
    dataset: str = "arithmetic"  # trains on data_dir/dataset, made by prepare_data.py
    data_dir: str = "data"  # where the data sets are
    out_dir: str | None = None  # checkpoints and log.jsonl go here; None: out/dataset
    init_from: str | None = "scratch"  # scratch, resume (from out_dir), or a checkpoint to take weights from
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
    eval_seqs: int = 512  # validation sequences, with fixed masks
    log_interval: int = 100  # steps between log lines; the loss is the mean over these steps
    wandb: str | None = None  # project name: also log to Weights & Biases
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 where a GPU has it
    compile: bool = False  # torch.compile: a minute at the start, then faster steps

    def __post_init__(self):
        self.out_dir = self.out_dir or f"out/{self.dataset}"
        for name, value in asdict(self).items():
            least = 2 if name == "eval_seqs" else int(name.endswith(("_size", "_interval")))
            most = 1 if name in ("warmup", "random_length", "beta1", "beta2") else 1e30
            if isinstance(value, (int, float)) and not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must lie between {least} and {most}")
        self.min_lr = self.learning_rate / 10 if self.min_lr is None else self.min_lr
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}; lower it")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be auto, float32 or bfloat16")


MODEL_KEYS = [field.name for field in fields(MDMConfig) if field.name != "vocab_size"]
# What a resumed run may set anew. Every other key keeps its value.
MAY_CHANGE = {"data_dir", "max_steps", "train_flops", "epochs", "eval_interval", "log_interval", "wandb"}
MAY_CHANGE |= {"device", "compile", "sink_attention"}


def load_meta(folder: str) -> dict:
    """meta.json of prepared data. Raises ValueError if it is missing, or a token file has another size."""
    path, again = os.path.join(folder, "meta.json"), f"run: python prepare_data.py {os.path.basename(folder)}"
    if not os.path.exists(path):
        raise ValueError(f"data set {folder} is not prepared; {again}")
    with open(path) as file:
        meta = json.load(file)
    for split, n in meta["tokens"].items():
        path, size = os.path.join(folder, f"{split}.bin"), n * np.dtype(meta["dtype"]).itemsize
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise ValueError(f"{path} does not have the {size:,} bytes that meta.json says; {again}")
    return meta


def token_batches(folder: str, meta: dict, cfg: TrainConfig):
    """get_batch for pretraining on token files: all tokens are maskable. Training sequences start at random
    (by seed and index), or where documents are short, one a line, at the end-of-text before one. The
    eval_seqs validation sequences are spread evenly over the held-out part."""
    B, T, data, starts = cfg.micro_batch_size, cfg.block_size, {}, {}
    for split in ("train", "val"):
        data[split] = np.memmap(os.path.join(folder, f"{split}.bin"), meta["dtype"], mode="r")
        starts[split] = range(max(0, len(data[split]) - T + 1))
        if meta["one_per_line"]:
            starts[split] = np.flatnonzero(data[split][: len(starts[split])] == meta["eot_id"])
        if len(starts[split]) == 0:
            raise ValueError(f"{folder}/{split}.bin is too short for block_size {T}; lower block_size")

    def get_batch(split, index):
        n = len(starts[split])
        if split == "train":
            chosen = np.random.default_rng([cfg.seed, index]).integers(n, size=B)
        else:
            chosen = np.arange(index * B, (index + 1) * B) * n // cfg.eval_seqs % n
        x0 = np.stack([data[split][starts[split][i] :][:T] for i in chosen]).astype(np.int64)
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
    """The context in which forward passes run in dtype."""
    if dtype == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def flops_utilization(model, T, tokens_per_s):
    """MFU of a GPU, 0 if its peak is unknown. FLOPs per token (PaLM, appendix B): 6 per weight, and 12 *
    n_layer * n_embd * T. The head counts half: on average half of the tokens are hidden."""
    # dense peak of bfloat16 matrix products, TFLOP/s, by the vendors' data sheets
    peaks = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165}
    config, head = model.config, model.lm_head.weight
    name = torch.cuda.get_device_name(head.device) if head.is_cuda else ""
    peak = max((1e12 * peak for key, peak in peaks.items() if key in name), default=math.inf)
    flops = 6 * (model.num_params() + head.numel() / 2) + 12 * config.n_layer * config.n_embd * T
    return flops * tokens_per_s / peak


def made_by() -> dict:
    """What made a number besides settings, weights and data: the commit, if there is one, and torch."""
    git, folder = "git describe --always --dirty --exclude=*", os.path.dirname(os.path.abspath(__file__))
    commit = subprocess.run(git, shell=True, cwd=folder, capture_output=True, text=True).stdout.strip()
    return {"commit": commit or None, "torch": torch.__version__}


def open_locked(path):
    """path, opened to append, locked until it is closed. Raises ValueError if another process has it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file = open(path, "a")
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except OSError as error:
        raise ValueError(
            f"{path} is in use ({error}); wait for that run, or choose another out_dir"
        ) from error
    return file


def write_file(path, write):
    """write(file) under a temporary name, flushed, then renamed: a crash or full disk keeps the old file."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise ValueError(f"cannot write {path} ({error}); make room, then run it again") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def get_lr(step, max_steps, peak, floor, warmup_steps):
    """Linear from 0 to peak over warmup_steps, then half a cosine down to floor at max_steps."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = min(1, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


@torch.no_grad()
def validate(model, get_batch, B, n_seqs, dtype="auto", mc_num=1, rank=0, world_size=1):
    """The bound on -log p of n_seqs validation sequences, of which get_batch makes B: nats per maskable token,
    its standard error, nats and tokens of each sequence. A sequence has mc_num evenly spaced noise levels and
    fixed noise, the same for every model, batch size and number of processes."""
    device = next(model.parameters()).device
    golden_ratio = (
        math.sqrt(5) - 1
    ) / 2  # its multiples modulo 1 are evenly spread, in no order of the corpus
    t = torch.arange(n_seqs, dtype=torch.float64) * golden_ratio % 1 / mc_num
    sums = torch.zeros(2, n_seqs, dtype=torch.float64)  # nats, tokens
    for index in range(rank, math.ceil(n_seqs / B), world_size):
        rows = range(index * B, min(n_seqs, (index + 1) * B))
        x0, maskable = (tensor[: len(rows)] for tensor in get_batch("val", index))
        sums[1, rows] = maskable.sum(dim=1).double()
        for draw in range(mc_num):
            streams = [torch.Generator().manual_seed(seed_for(1234, row, draw)) for row in rows]
            noise = torch.stack([torch.rand(x0.size(1), generator=stream) for stream in streams])
            p_mask = noise_levels(t[rows, None] + draw / mc_num).float()
            xt, masked = mask_tokens(x0, p_mask, maskable, model.config.mask_id, noise)
            with autocast(device, dtype):
                sums[0, rows] += weighted_nll(model, x0, xt, masked, p_mask).cpu() / mc_num
    if world_size > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    nats, tokens = sums.cpu()
    return *mean_and_error(nats, tokens, t), nats, tokens


def mean_and_error(nats, tokens, t):
    """Nats per token and its standard error, from nats and tokens (N,) of sequences with noise levels t (N,).
    Even spacing takes the spread over t out of the mean. So the error comes from differences of neighbours in
    t, of which the first and the last count twice. It takes the texts for different ones."""
    mean = nats.sum() / tokens.sum()
    squares = ((nats - mean * tokens)[t.argsort()] / tokens.mean()).diff().square()
    variance = (squares.sum() + squares[0] + squares[-1]) / 2 / (len(t) + 1)
    return mean.item(), (variance / len(t)).sqrt().item()


# ---------- The training loop


def train(cfg: TrainConfig, model: MDM, get_batch, meta=None, resume=None) -> MDM:
    """Trains model in place and returns it. Pretraining and fine-tuning differ only in get_batch.

    get_batch(split, index) -> x0, maskable: (micro_batch_size, T) on the CPU, split 'train' or 'val'
    meta    the data set's meta.json, kept in the checkpoints with its tokenizer
    resume  a checkpoint to continue from: its step and optimizer state (its weights are in model already)
    Writes ckpt.pt (latest), best.pt (lowest validation loss) and log.jsonl. Ctrl-C or SIGTERM ends the step,
    saves, exits with 128 + signal; a second Ctrl-C exits at once. Raises ValueError for an infinite loss."""
    rank, world_size, device = setup_distributed(cfg.device)
    B, T = cfg.micro_batch_size, cfg.block_size
    grad_accum, step_tokens = cfg.batch_size // (B * world_size), cfg.batch_size * T
    if grad_accum * B * world_size != cfg.batch_size:
        passes = f"micro_batch_size {B} x {world_size} processes"
        raise ValueError(f"batch_size {cfg.batch_size} is not a multiple of {passes}; change one of them")
    max_steps, resume = cfg.max_steps, resume or {}
    if cfg.train_flops is not None:  # C = 6 N D with the N of the table, for every arm the same
        max_steps = int(cfg.train_flops / (6 * model.config.table_params() * step_tokens))
    start, best_val_loss = resume.get("step", 0), resume.get("best_val_loss", math.inf)
    losses = resume.get("losses", [])  # of the steps since the last log line
    if start > max_steps:
        raise ValueError(f"the run to resume has made {start} steps, but max_steps is {max_steps}; raise it")
    warmup_steps = round(cfg.warmup * max_steps)

    model.to(device)
    if cfg.compile:
        model.trunk = torch.compile(model.trunk)
    ddp = model
    if world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        ddp = DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
    options = {"lr": cfg.learning_rate, "betas": (cfg.beta1, cfg.beta2), "weight_decay": cfg.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **options, fused=device.type in ("cuda", "cpu"))
    if resume:
        optimizer.load_state_dict(resume["optimizer"])

    log_file = open_locked(os.path.join(cfg.out_dir, "log.jsonl")) if rank == 0 else None
    disable = None if rank == 0 else True  # None: without a terminal there is no bar
    bar = tqdm(total=max_steps, initial=start, desc=cfg.out_dir, unit="step", disable=disable)
    wandb_run = None
    if cfg.wandb and rank == 0:
        names = {"project": cfg.wandb, "name": cfg.out_dir, "id": resume.get("wandb_id"), "resume": "allow"}
        wandb_run = configurator.need("wandb").init(**names, config=asdict(cfg))

    def log(line, **row):
        """A line for people, a row of log.jsonl. A resumed run may log a step again: its last row counts."""
        if rank == 0:
            bar.write(line)
            print(json.dumps(row), file=log_file, flush=True)
        if wandb_run:
            wandb_run.log(row, step=row["step"])

    def save(name, validated):
        state = {"step": step, "validated": validated, "best_val_loss": best_val_loss, "losses": losses}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "meta": meta}
        state |= {"model_config": asdict(model.config), "run_config": asdict(cfg)}
        state["wandb_id"] = wandb_run and wandb_run.id
        if rank == 0:
            write_file(os.path.join(cfg.out_dir, name), lambda file: torch.save(state, file))

    def request_stop(signum, frame):
        nonlocal stop_signal
        stop_signal = signum
        if world_size == 1:  # torchrun repeats a Ctrl-C, which its processes have got already
            signal.signal(signal.SIGINT, signal.default_int_handler)

    stop = stop_signal = 0
    handlers = {signum: signal.signal(signum, request_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    line = f"{model.num_params(False):,} parameters on {world_size} x {device} ({threads} threads), "
    line += f"{max_steps:,} steps of {grad_accum} x {world_size} x {B} sequences of {T} tokens"
    facts = {**made_by(), "config": asdict(cfg), "data_sha256": meta and meta["sha256"]}
    log(line, step=start, **facts, device=str(device), processes=world_size)
    index = start * grad_accum * world_size + rank  # of the micro-batch in the whole run
    x0, maskable = get_batch("train", index)
    log_time, log_step = time.time(), start
    try:
        for step in range(start, max_steps + 1):
            if stop:  # without a validation that is due: there may be no time for it
                save("ckpt.pt", validated=False)
                break
            validated = step == start and resume.get("validated")
            if (step == max_steps or step % cfg.eval_interval == 0) and not validated:
                eval_time, processes = time.time(), {"rank": rank, "world_size": world_size}
                val_loss, val_se, *_ = validate(model, get_batch, B, cfg.eval_seqs, cfg.dtype, **processes)
                line = f"step {step:>6}/{max_steps}  val loss {val_loss:.4f} ± {val_se:.4f}"
                log(line, step=step, val_loss=val_loss, val_se=val_se)
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    save("best.pt", validated=True)
                save("ckpt.pt", validated=True)
                log_time += time.time() - eval_time  # not counted in tokens/s
            if step == max_steps:
                break

            # ---- one optimizer step
            lr = get_lr(step + 1, max_steps, cfg.learning_rate, cfg.min_lr, warmup_steps)
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            stats = torch.zeros(3, device=device)  # loss, gradient norm, stop
            for micro in range(grad_accum):
                if world_size > 1:  # the processes add up their gradients once
                    ddp.require_backward_grad_sync = micro == grad_accum - 1
                torch.manual_seed(seed_for(cfg.seed, index))  # the masks, and dropout if you add some
                with autocast(device, cfg.dtype):
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
                what = f"step {step + 1} was not made: its loss is {loss}, the gradient's norm {grad_norm}"
                raise ValueError(f"{what}. Start a new run with a lower learning_rate (now {lr:.1e})")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # ---- the rest is reporting
            done = step + 1
            losses.append(loss)
            bar.update(1)
            if done % cfg.log_interval == 0 or done == max_steps:
                speed = (done - log_step) * step_tokens / (time.time() - log_time)
                left = tqdm.format_interval((max_steps - done) * step_tokens / speed)
                mfu = flops_utilization(model, T, speed / world_size)
                row = {"loss": sum(losses) / len(losses), "lr": lr, "grad_norm": grad_norm, "mfu": mfu}
                line = f"step {done:>6}/{max_steps}  loss {row['loss']:.4f}  {speed:,.0f} tokens/s"
                line += f"  mfu {mfu:.1%}" * (mfu > 0) + f"  {left} left"
                log(line, step=done, tokens=done * step_tokens, tokens_per_s=speed, **row)
                losses, log_time, log_step = [], time.time(), done
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        bar.close()
        if wandb_run:
            wandb_run.finish(exit_code=int(sys.exc_info()[0] is not None))  # 1 marks a failed run
    if stop:
        if rank == 0:
            print(f"stopped at step {step}; continue with --init_from=resume --out_dir={cfg.out_dir}")
        sys.exit(128 + (stop_signal or signal.SIGTERM))
    return model


def fix(cfg, set_by, fixed, source):
    """cfg with what source fixes, {key: value}. Raises ValueError for a key that is set to something else."""
    for key, value in fixed.items():
        if key in set_by and getattr(cfg, key) != value:
            setting = f"{key}={getattr(cfg, key)!r} ({set_by[key]})"
            raise ValueError(f"{setting} contradicts {source}, which has {value!r}; leave it out")
        set_by.setdefault(key, source)
    return replace(cfg, **fixed)


def start_run(cfg: TrainConfig, set_by: dict):
    """(cfg, meta, model, checkpoint to resume or None), as init_from and preset want. set_by learns what they
    set. Raises ValueError where settings, checkpoint, data and out_dir contradict each other."""
    if cfg.preset is not None:
        shape = MDMConfig.preset(cfg.preset)
        shape = {key: getattr(shape, key) for key in ("n_layer", "n_head", "n_embd", "mlp_hidden")}
        cfg = fix(cfg, set_by, shape, f"preset {cfg.preset}")
    resumes = cfg.init_from == "resume"
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):
        if not resumes and os.path.exists(path := os.path.join(cfg.out_dir, name)):
            raise ValueError(f"{path} exists; continue with --init_from=resume, or set another --out_dir")
    if cfg.init_from == "scratch":
        meta = load_meta(os.path.join(cfg.data_dir, cfg.dataset))
        shape = {key: getattr(cfg, key) for key in MODEL_KEYS}
        return cfg, meta, MDM(MDMConfig(vocab_size=meta["vocab_size"], **shape), cfg.seed), None

    path = cfg.out_dir if resumes else cfg.init_from
    checkpoint = load_checkpoint(path)
    shape, trained_on = checkpoint["model_config"], checkpoint["meta"]
    fixed, may_change = {key: shape[key] for key in MODEL_KEYS}, {"block_size", "sink_attention"}
    if resumes:
        fixed, may_change = checkpoint["run_config"], MAY_CHANGE
        fixed.update(out_dir=cfg.out_dir, init_from="resume")
        if fixed.keys() != asdict(cfg).keys():
            raise ValueError(f"{path} was made by another script or version; resume it with that one")
    for key in may_change & set_by.keys():
        del fixed[key]
    cfg = fix(cfg, set_by, fixed, path)
    meta = load_meta(os.path.join(cfg.data_dir, cfg.dataset))
    tokenizers = [data["tokenizer"] | {"pattern": None} for data in (trained_on or meta, meta)]
    if tokenizers[0] != tokenizers[1] or shape["vocab_size"] != meta["vocab_size"]:
        sizes = f"({shape['vocab_size']:,} and {meta['vocab_size']:,} tokens)"
        raise ValueError(f"{path} and data set {cfg.dataset} have different vocabularies {sizes}")
    if resumes and trained_on and trained_on["sha256"] != meta["sha256"]:
        raise ValueError(f"cannot resume: {cfg.dataset} has other tokens than when {path} was saved")
    shape.update(block_size=cfg.block_size, sink_attention=cfg.sink_attention)
    return cfg, meta, MDM.from_checkpoint(checkpoint), checkpoint if resumes else None


def main():
    cfg, set_by = configurator.parse(TrainConfig)
    rank, _, _ = setup_distributed(cfg.device)
    cfg, meta, model, resume = start_run(cfg, set_by)
    if rank == 0:
        print(configurator.describe(cfg, set_by))
    train(cfg, model, token_batches(os.path.join(cfg.data_dir, cfg.dataset), meta, cfg), meta, resume)


if __name__ == "__main__":
    configurator.run(main)
