"""docs/adapt.md in numbers: what an adapted model's losses are, and where its attention goes.

    python -m docs.results.adapt measure out/adapt/sink-0 data-smollm2/stories data-smollm2/wikitext2
    python -m docs.results.adapt tables docs/results/adapt

measure writes measured.jsonl beside the checkpoint. Its parts are: bound, on held-out texts of each folder,
also with the first token visible; attention, by kind of key; writing, attention while texts are written,
without and with a prompt; items, the chain rule of the items of --items=lambada.jsonl,..."""

import json
import sys
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

import torch
from tqdm import tqdm

import configurator
from docs.results.anchor import keep_first_visible
from docs.results.study import attention_by_kind, numbers
from eval import EvalConfig, read_items, score_item, validation
from extras.sinks import Run, SinksConfig, look_at
from train import made_by, setup_distributed, validate, write_file


@dataclass
class AdaptConfig:
    parts: str = "bound,attention,writing"  # what to measure; also items
    texts: int = 512  # of the bound
    limit: int = 8  # texts that are written
    steps: int = 64  # of writing a text
    prompt_length: int = 16  # tokens given, in the second of two ways to write the texts
    items: str = ""  # .jsonl files of items, with a comma between them
    n_items: int = 300  # of each file
    device: str = "auto"  # auto: cuda, else mps, else cpu


def bounds(run, folders, n_texts):
    """Nats per token, and nats of each text, on the validation texts of each folder."""
    B = run.checkpoint["run_config"]["micro_batch_size"]
    for folder in folders:
        get_batch, n, _ = validation(run.checkpoint, folder, n_texts)
        for visible in (False, True):
            batches = keep_first_visible(get_batch) if visible else get_batch
            mean, se, nats, tokens = validate(run.model, batches, B, n, "float32")
            row = Path(folder).name + ", first token visible" * visible
            texts = {"nats": numbers(nats), "tokens": tokens.long().tolist()}
            yield {"table": "bound", "row": row, "mean": mean, "se": se, **texts}


def writing(run, cfg, length, device):
    """Where attention is while texts are written with length tokens given: a row for each layer, means over
    texts, and the first text with its positions step by step."""
    run = Run(run.name, SinksConfig(limit=cfg.limit, prompt_length=length), device)
    look_at(run, SinksConfig(limit=cfg.limit, prompt_length=length, steps=cfg.steps))
    for number, layer in enumerate(run.layers):
        yield {"table": "writing", "row": f"layer {number}", "given": length, **layer}
    first = run.prompts[0]
    text = {"tokens": first["tokens"], "steps": first["steps"], "text": run.tokenizer.decode(first["tokens"])}
    for key in ("position", "top"):
        text[key] = [layer[key] for layer in first["layers"]]
    yield {"table": "first text", "row": "", "given": length, **text}


def items(run, paths, n_items):
    """log p and accuracy of each item of each file, by the chain rule."""
    cfg = EvalConfig(nll_type="chain_rule", dtype="float32")
    for path in paths:
        records = []
        for item in tqdm(read_items(path)[:n_items], desc=path, disable=None):
            records.append(score_item(run.model, run.tokenizer, item, cfg))
        keys = [key for key in ("log_p", "acc", "acc_norm", "cut") if key in records[0]]
        yield {"table": "items", "row": Path(path).stem, **{key: [r[key] for r in records] for key in keys}}


def measure(path, folders, cfg):
    _, _, device = setup_distributed(cfg.device)
    torch.set_float32_matmul_precision("highest")  # no TF32
    sinks = SinksConfig(limit=64, prompt_length=0)
    run = Run(path, sinks, device)
    step, facts = run.checkpoint["step"], made_by() | {"settings": asdict(cfg), "folders": folders}
    rows = [{"table": "facts", "row": "", "config": run.checkpoint["run_config"], **facts}]
    if "bound" in cfg.parts:
        rows += bounds(run, folders, cfg.texts)
    if "attention" in cfg.parts:
        rows += attention_by_kind(run, [(step, run.model)], sinks, device)
    if "writing" in cfg.parts:
        for length in (0, cfg.prompt_length):
            rows += writing(run, cfg, length, device)
    if "items" in cfg.parts:
        rows += items(run, cfg.items.split(","), cfg.n_items)
    lines = [json.dumps(row | {"step": step}) + "\n" for row in rows]
    write_file(f"{path}/measured.jsonl", lambda file: file.write("".join(lines).encode()))
    print(f"wrote {path}/measured.jsonl")


def main():
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    if len(names) < 3 or names[0] != "measure":
        raise ValueError("wanted: measure RUN DATA [DATA ...] [--key=value ...]")
    cfg, _ = configurator.parse(AdaptConfig, sys.argv[1 + len(names) :])
    measure(names[1], names[2:], cfg)


if __name__ == "__main__":
    configurator.run(main)
