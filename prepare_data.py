"""Turns a corpus into token files: data/<name>/train.bin, val.bin and meta.json.

    python prepare_data.py                                   # arithmetic: generated word problems, no network
    python prepare_data.py shakespeare --tokenizer=bytes     # downloads 1 MB of text
    python prepare_data.py text --source=my_folder           # .txt, .jsonl ("text" field), also .gz and .xz
    python prepare_data.py fineweb_edu --max_tokens=1e9      # streams from the hub (pip install datasets)

A .bin file is the tokens of all documents, one after another as uint16 (uint32 for a vocabulary over 65,536),
each closed by the end-of-text token. Files are read as streams and encoded on all cores. A word problem reads
"Question: ... Answer: <<3+4=7>> #### 7"; _cuts.npy files tell sft_gsm8k.py where the parts of each begin."""

import base64
import collections
import gzip
import hashlib
import heapq
import http.client
import io
import json
import lzma
import os
import pathlib
import random
import sys
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import configurator

EOT = "<|endoftext|>"
CHARS_AT_ONCE = 1 << 20  # text encoded as one piece of work; longer documents are cut at a line's end


@dataclass
class PrepareConfig:
    name: str = "arithmetic"  # or gsm8k, shakespeare, wikitext2, tinystories, openwebtext, ..., text
    source: str | None = None  # file, folder, URL or hub:ID[@CONFIG][:SPLIT]; None: the public source
    val_source: str | None = None  # likewise; None: the public one, or the last val_fraction of source
    val_fraction: float | None = None  # share of the tokens held out from the end; None: as the data set says
    tokenizer: str | None = None  # gpt2, bytes, or bpe (trained on the corpus); None: as the data set says
    vocab_size: int | None = None  # of a bpe tokenizer, end-of-text included; None: 4096 (arithmetic: 512)
    split_digits: bool | None = None  # every digit its own token; None: for arithmetic and gsm8k
    max_tokens: int | None = None  # stop after so many tokens of source
    data_dir: str = "data"  # the files go to data_dir/name
    num_problems: int = 50000  # arithmetic: training problems (1,000 more each for validation and test)
    seed: int = 0  # arithmetic: seed of the generator


@dataclass
class Corpus:
    source: str | None
    val_source: str | None = None
    val_fraction: float = 0.01
    documents: str = "marked"  # 'marked' by <|endoftext|>, wikitext 'articles', or 'problems', one a line
    tokenizer: str = "gpt2"
    test_source: str | None = None  # problems for eval.py; None: test.txt beside the prepared data


GITHUB, HF = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
ICOT, ICOT_LFS = "da03/implicit_chain_of_thought/main/data/gsm8k", "https://media.githubusercontent.com/media"
GSM8K_VALID = f"{GITHUB}/{ICOT}/valid.txt"  # 500 lines of GSM8K's training set
GSM8K_TEST = f"{GITHUB}/openai/grade-school-math/master/grade_school_math/data/test.jsonl"
TINYSHAKESPEARE = f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
WIKITEXT2 = f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2"
TINYSTORIES = f"{HF}/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4"
CORPORA = {
    "arithmetic": Corpus(None, documents="problems", tokenizer="bpe"),
    "gsm8k": Corpus(f"{ICOT_LFS}/{ICOT}/train.txt", GSM8K_VALID, 0.02, "problems", test_source=GSM8K_TEST),
    "shakespeare": Corpus(TINYSHAKESPEARE, val_fraction=0.1, tokenizer="bytes"),
    "wikitext2": Corpus(f"{WIKITEXT2}/train.txt", f"{WIKITEXT2}/valid.txt", documents="articles"),
    "tinystories": Corpus(f"{TINYSTORIES}-train.txt", f"{TINYSTORIES}-valid.txt"),
    "openwebtext": Corpus("hub:Skylion007/openwebtext:train", val_fraction=0.0005),
    "fineweb_edu": Corpus("hub:HuggingFaceFW/fineweb-edu@sample-10BT:train", val_fraction=0.0005),
    "slimpajama": Corpus("hub:cerebras/SlimPajama-627B:train", "hub:cerebras/SlimPajama-627B:validation"),
    "text": Corpus(None),
}

# ---------- Tokenizers: tiktoken encodings, described by a dict that meta.json and every checkpoint carry

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's
DIGIT_PATTERN = PATTERN.replace(r" ?\p{N}+", r"\p{N}")
TOKENIZERS = ("gpt2", "bytes", "bpe")


def load_tokenizer(spec: dict) -> tiktoken.Encoding:
    """The encoding of a tokenizer dict: its name, pattern, vocab_size, and for bpe the ranks in base64."""
    if spec["name"] == "gpt2":
        try:
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except OSError as error:
            hint = "set TIKTOKEN_CACHE_DIR to a folder with its vocabulary, or choose --tokenizer=bpe"
            raise ValueError(f"gpt2 could not be downloaded ({type(error).__name__}); {hint}") from error
    elif spec["name"] == "bytes":
        ranks = {bytes([byte]): byte for byte in range(256)}
    else:
        ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"])}
    name, pattern, size = spec["name"], spec["pattern"], spec["vocab_size"]
    try:
        special = {EOT: size - 1}
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=size
        )
    except Exception as error:  # tiktoken has no error of its own for ranks and patterns that are none
        fault = f"the tokenizer's description is damaged ({error!r})"
        raise ValueError(f"{fault}; prepare the data set again") from error


def make_tokenizer(name: str, split_digits: bool, vocab_size: int, texts) -> dict:
    """A tokenizer dict. vocab_size and texts, what it is trained on, count only for bpe."""
    spec = {"name": name, "pattern": DIGIT_PATTERN if split_digits else PATTERN}
    if name != "bpe":
        return {**spec, "vocab_size": 50257 if name == "gpt2" else 257}
    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}; bpe needs at least 258: bytes, a merge, end-of-text")
    ranks = [base64.b64encode(token).decode() for token in train_bpe(texts, spec["pattern"], vocab_size - 1)]
    return {**spec, "vocab_size": len(ranks) + 1, "ranks": ranks}


def encode_pair(tokenizer, context, continuation, block_size):
    """Token ids of context and continuation as they stand in the joint text: a token that reaches beyond the
    context is the continuation's. An empty context becomes end-of-text; a long one loses tokens on its left,
    and their number is the third result. Raises ValueError for a too long continuation."""
    ids = tokenizer.encode_ordinary(context + continuation)
    ends = np.cumsum([len(piece) for piece in tokenizer.decode_tokens_bytes(ids)])
    n = int((ends <= len(context.encode())).sum())
    context, target = ids[:n] or [tokenizer.eot_token], ids[n:]
    n_cut = max(0, len(context) + len(target) - block_size)
    if n_cut > len(context):
        raise ValueError(f"a continuation of {len(target)} tokens exceeds block_size {block_size}")
    return context[n_cut:], target, n_cut


def train_bpe(texts, pattern: str, n_tokens: int, max_chars: int = 50_000_000) -> dict[bytes, int]:
    """Byte pair encoding: starting from the 256 bytes, merge the most frequent neighbours into a new token
    until there are n_tokens. Learned from the first max_chars characters. Ties go to the smaller bytes."""
    counts = collections.Counter()
    for text in texts:
        counts.update(regex.findall(pattern, text))
        max_chars -= len(text)
        if max_chars <= 0:
            break
    words = []
    for word, count in sorted(counts.items()):
        words.append(([bytes([byte]) for byte in word.encode("utf-8", "replace")], count))
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = collections.Counter()  # two neighbouring tokens, joined -> how often
    words_with = collections.defaultdict(set)  # ... -> indices of the words that hold them

    def count_pairs(index, sign):
        parts, count = words[index]
        for first, second in zip(parts, parts[1:]):
            pairs[first + second] += sign * count
            words_with[first + second].add(index)

    for index in range(len(words)):
        count_pairs(index, +1)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < n_tokens:
        count, pair = heapq.heappop(heap)
        if pairs[pair] < 2 or pair in ranks:
            continue
        if pairs[pair] != -count:  # the count has changed since it was pushed
            heapq.heappush(heap, (-pairs[pair], pair))
            continue
        ranks[pair] = len(ranks)
        for index in sorted(words_with.pop(pair)):
            parts, count = words[index]
            before = set(zip(parts, parts[1:]))
            count_pairs(index, -1)
            merged = []
            for part in parts:
                if merged and merged[-1] + part == pair:
                    merged[-1] = pair
                else:
                    merged.append(part)
            words[index] = (merged, count)
            count_pairs(index, +1)
            for first, second in set(zip(merged, merged[1:])) - before:
                heapq.heappush(heap, (-pairs[first + second], first + second))
    return ranks


# ---------- Reading: a source is a stream of documents in pieces (text, is_end_of_document)


class Source:
    """Documents of a file, folder, URL or hub data set. bytes_read of bytes_total (or None) are done."""

    def __init__(self, address: str, documents: str, download_dir: str):
        self.address, self.documents, self.paths = address, documents, []
        self.bytes_read, self.bytes_total, self.malformed, self.first_malformed = 0, None, 0, None
        if address.startswith("hub:"):
            if documents == "problems":
                raise ValueError(f"{address}: problems are read from files; give a .txt or .jsonl")
            return
        path = download(address, download_dir) if "://" in address else address
        if not os.path.exists(path):
            raise ValueError(f"source {path} not found")
        files = [os.path.join(folder, file) for folder, _, names in os.walk(path) for file in names] or [path]
        self.paths = sorted(file for file in files if file_kind(file) is not None)
        if not self.paths:
            raise ValueError(f"{path}: wanted .txt or .jsonl files (also .gz, .xz), or a folder of them")
        self.bytes_total = sum(os.path.getsize(path) for path in self.paths)

    def __iter__(self):
        self.bytes_read, self.malformed = 0, 0
        if not self.paths:
            yield from read_hub(self.address)
        for path in self.paths:
            yield from self.read_file(path)

    def read_file(self, path):
        base = self.bytes_read
        with open(path, "rb") as raw:
            if raw.peek(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
            data = gzip.open(raw) if path.endswith(".gz") else lzma.open(raw) if path.endswith(".xz") else raw
            try:
                for piece in self.split(io.TextIOWrapper(data, encoding="utf-8", newline="\n"), path):
                    self.bytes_read = base + raw.tell()
                    yield piece
            except (UnicodeDecodeError, EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} cannot be read as UTF-8 text ({error}); convert it") from error

    def split(self, lines, path):
        """Lines of one file -> (text, is_end_of_document)."""
        is_json = file_kind(path) == ".jsonl"
        if not is_json and self.documents != "problems":
            yield from self.split_text(lines)
            return
        for number, line in enumerate(lines, 1):
            if line.strip() and self.documents == "problems":
                yield from self.split_problem(line, is_json, f"{path}, line {number}")
            elif line.strip():
                yield json_text(line, f"{path}, line {number}"), True

    def split_problem(self, line, is_json, position):
        """The three parts of a problem. Each begins with a space, where every tokenizer begins a new word: so
        its tokens are the same alone, as an evaluation meets them, and in the middle of the text."""
        problem = parse_problem(line, is_json)
        if problem is None:
            self.malformed += 1
            self.first_malformed = self.first_malformed or position
            return
        for text, begins in zip(problem, ("Question: ", " Answer: ", " #### ")):
            yield (begins + text).rstrip(), begins == " #### "

    def report_malformed(self):
        if self.malformed:
            wanted = "question||thoughts #### answer, or JSON with 'question' and 'answer #### number'"
            lines = f"{self.malformed:,} lines that are not {wanted}"
            print(f"{self.address}: left out {lines}; the first is {self.first_malformed}")

    def split_text(self, lines):
        text, size = [], 0
        while line := lines.readline(CHARS_AT_ONCE):  # a longer line comes in parts
            if self.documents == "articles" and regex.fullmatch(r" = [^=\s].* = \n", line):
                yield "".join(text), True
                text, size = [], 0
            *ended, rest = line.split(EOT)
            for end in ended:
                yield ("".join(text) + end).removesuffix("\n"), True
                text, size, rest = [], 0, rest.removeprefix("\n")
            # A long document is cut where one line end stands between two other characters: no tokenizer
            # pattern reads across. Only after sixteen times the length without one is it cut anywhere.
            lone_line_end = text and regex.search(r"\S\n$", text[-1]) and not rest[:1].isspace()
            if size > (CHARS_AT_ONCE if lone_line_end else 16 * CHARS_AT_ONCE):
                yield "".join(text), False
                text, size = [], 0
            text.append(rest)
            size += len(rest)
        yield "".join(text), True


def file_kind(path):
    stem, suffix = os.path.splitext(path.lower())
    kind = os.path.splitext(stem)[1] if suffix in (".gz", ".xz") else suffix
    return kind if kind in (".txt", ".jsonl") else None


def json_text(line, position):
    try:
        return json.loads(line)["text"] + ""  # a text, or a TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{position}: wanted JSON with a 'text' field, got {error!r}") from error


def parse_problem(line, is_json):
    """(question, thoughts, answer) of a line of one of two forms; None if it has no question or no answer.
    question||thoughts #### answer                  augmented GSM8K; thoughts are <<3+4=7>> <<7*2=14>>
    {"question": ..., "answer": "... #### answer"}  OpenAI's files; equations are picked out of the prose"""
    if is_json:
        try:
            row = json.loads(line)
            question, solution = row["question"] + "", row["answer"] + ""  # texts, or a TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
    else:
        question, _, solution = line.partition("||")
    thoughts, hashes, answer = solution.rpartition("####")
    if is_json:
        thoughts = " ".join(regex.findall(r"<<.*?>>", thoughts))
    if not (hashes and question.strip() and answer.strip()):
        return None
    return question.strip(), thoughts.strip(), answer.strip()


def final_number(text):
    """The number behind the first '#### ', as OpenAI's grader reads it, without commas; or None."""
    match = regex.search(r"#### (\-?[0-9\.\,]+)", text or "")
    try:
        return Decimal(match[1].replace(",", "")) if match else None
    except InvalidOperation:  # such as 1.2.3
        return None


def read_problems(address, download_dir):
    """[(question, gold)] of a source of problems. Lines that are none are left out, with a note."""
    source = Source(address, "problems", download_dir)
    texts = [text for text, _ in source]  # question, thoughts, answer, question, ...
    problems = [(q.removeprefix("Question: "), final_number(a)) for q, a in zip(texts[::3], texts[2::3])]
    source.report_malformed()
    numeric = [(question, str(gold)) for question, gold in problems if gold is not None]
    if len(numeric) < len(problems):
        print(f"{address}: left out {len(problems) - len(numeric):,} problems whose answer is no number")
    if not numeric:
        raise ValueError(f"{address} holds no problems; wanted question||thoughts #### answer, or a .jsonl")
    return numeric


def read_hub(address):
    name, _, split = address.removeprefix("hub:").partition(":")
    name, _, config = name.partition("@")
    load_dataset = configurator.need("datasets").load_dataset
    for row in load_dataset(name, config or None, split=split or "train", streaming=True):
        yield row["text"], True


def download(url, folder):
    """Local path of a URL's file, fetched once into folder. Raises ValueError if it cannot be had whole."""
    name = os.path.basename(url.split("?")[0].split("#")[0])
    path = os.path.join(folder, f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        print(f"downloading {url}", flush=True)
        try:
            urllib.request.urlretrieve(url, path + ".tmp")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"cannot download {url} ({error}); give the path of a local copy") from error
        os.replace(path + ".tmp", path)
    return path


def encode(pieces, tokenizer, dtype):
    """Tokens of (text, is_end_of_document) pairs, end-of-text after each document; how many of each pair."""
    arrays = []
    for text, is_end in pieces:
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair, as in JSON, becomes "?"
        tokens = tokenizer.encode_to_numpy(text, disallowed_special=())
        arrays.append(np.append(tokens, tokenizer.eot_token) if is_end else tokens)
    return np.concatenate(arrays).astype(dtype), [len(tokens) for tokens in arrays]


def group(source):
    """Documents that hold anything, in lists of about CHARS_AT_ONCE characters."""
    pieces, size, is_open = [], 0, False
    for text, is_end in source:
        if text.strip() or is_open:
            pieces.append((text, is_end))
            size, is_open = size + len(text), not is_end
        if size >= CHARS_AT_ONCE:
            yield pieces
            pieces, size = [], 0
    if pieces:
        yield pieces


def write_tokens(path, source, tokenizer, dtype, max_tokens):
    """Writes a source's tokens to path. Returns how many there are, how many documents, and (problems, 4):
    the positions where each problem's question, thoughts and answer begin and where it ends."""
    limit = 1 << 62 if max_tokens is None else max_tokens
    n_tokens, n_documents, sizes = 0, 0, []  # sizes: of the parts of problems
    groups, workers = group(source), os.cpu_count() or 1
    waiting = collections.deque()  # work under way, in order; its length bounds the memory
    wait = 0.1 if sys.stderr.isatty() else 30  # seconds between two lines of progress
    bar = tqdm(desc=os.path.basename(path), unit="tok", unit_scale=True, mininterval=wait, delay=wait)
    with open(path, "wb") as file, ThreadPoolExecutor(workers) as pool, bar:  # tiktoken releases the GIL
        while n_tokens < limit:
            while len(waiting) < 2 * workers and (pieces := next(groups, None)):
                waiting.append(pool.submit(encode, pieces, tokenizer, dtype))
            if not waiting:
                break
            tokens, new_sizes = waiting.popleft().result()
            if source.documents == "problems":
                sizes += new_sizes
            tokens = tokens[: limit - n_tokens]
            tokens.tofile(file)
            n_tokens += len(tokens)
            n_documents += int((tokens == tokenizer.eot_token).sum())
            if source.bytes_total and source.bytes_read:
                bar.total = max(n_tokens, int(n_tokens * source.bytes_total / source.bytes_read))
            bar.update(len(tokens))
        file.flush()
        os.fsync(file.fileno())
    source.report_malformed()
    bounds = np.cumsum([0, *sizes])
    cuts = bounds[np.arange(0, len(sizes) - 2, 3)[:, None] + np.arange(4)]
    return n_tokens, n_documents, cuts[cuts[:, 3] <= n_tokens]


def split_tail(train_path, val_path, dtype, fraction, eot_id, problem_starts):
    """Moves about the last fraction of train_path's tokens to val_path, from the start of a document if one
    is near; or the last fraction of the problems, if there are any. Returns how many tokens each file has."""
    tokens = np.memmap(train_path, dtype, mode="r")
    if len(problem_starts):
        cut = int(problem_starts[-max(1, round(len(problem_starts) * fraction))])
    else:
        size = max(1, round(len(tokens) * fraction))
        cut = len(tokens) - size
        ends = np.flatnonzero(tokens[cut:-1] == eot_id)
        if len(ends) and ends[0] < size / 2:  # else the rest would be too small; then cut within a document
            cut += int(ends[0]) + 1
    n_val = len(tokens) - cut
    tokens[cut:].tofile(val_path)
    os.truncate(train_path, cut * dtype.itemsize)
    return cut, n_val


def load_meta(folder: str) -> dict:
    """meta.json of prepared data. Raises ValueError if it is missing, or a token file has another size."""
    path, again = f"{folder}/meta.json", f"run: python prepare_data.py {os.path.basename(folder)}"
    if not os.path.exists(path):
        raise ValueError(f"data set {folder} is not prepared; {again}")
    with open(path) as file:
        meta = json.load(file)
    for split, n in meta["tokens"].items():
        path, size = f"{folder}/{split}.bin", n * np.dtype(meta["dtype"]).itemsize
        if not os.path.exists(path) or os.path.getsize(path) != size:
            raise ValueError(f"{path} does not have the {size:,} bytes that meta.json says; {again}")
    return meta


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepare(cfg: PrepareConfig) -> dict:
    """Writes data_dir/name/{train.bin,val.bin,meta.json}, returns the meta. The files appear only when all is
    complete, meta.json last. Raises ValueError for a source that cannot be read or is too short."""
    if cfg.name not in CORPORA:
        raise ValueError(f"unknown data set {cfg.name!r}; there are {', '.join(CORPORA)}")
    if cfg.tokenizer not in (None, *TOKENIZERS):
        raise ValueError(f"unknown tokenizer {cfg.tokenizer!r}; there are {', '.join(TOKENIZERS)}")
    corpus = CORPORA[cfg.name]
    fraction = corpus.val_fraction if cfg.val_fraction is None else cfg.val_fraction
    if not 0 < fraction < 1:
        raise ValueError(f"val_fraction is {fraction}; it must lie between 0 and 1")
    folder = os.path.join(cfg.data_dir, cfg.name)
    address = cfg.source or corpus.source
    val_address = cfg.val_source or (None if cfg.source else corpus.val_source)
    stated = address, val_address or f"last {fraction} of the tokens"
    if cfg.name == "arithmetic":
        if cfg.source or cfg.val_source:
            raise ValueError("arithmetic is generated; for your own problems use gsm8k --source=...")
        address, val_address = write_arithmetic(folder, cfg.num_problems, cfg.seed)
        stated = [f"generated, seed {cfg.seed}"] * 2
    if address is None:
        raise ValueError(f"data set {cfg.name!r} has no public source; give --source=file-or-folder")
    has_problems, download_dir = corpus.documents == "problems", os.path.join(folder, "download")
    source = Source(address, corpus.documents, download_dir)
    val_source = Source(val_address, corpus.documents, download_dir) if val_address else None

    split_digits = has_problems if cfg.split_digits is None else cfg.split_digits
    vocab_size = (512 if cfg.name == "arithmetic" else 4096) if cfg.vocab_size is None else cfg.vocab_size
    texts = (text for text, _ in source)
    spec = make_tokenizer(cfg.tokenizer or corpus.tokenizer, split_digits, vocab_size, texts)
    tokenizer = load_tokenizer(spec)
    dtype = np.dtype("uint16" if spec["vocab_size"] <= 1 << 16 else "uint32")

    os.makedirs(folder, exist_ok=True)
    names = ["train.bin", "val.bin"] + (["train_cuts.npy", "val_cuts.npy"] if has_problems else [])
    partial = {name: os.path.join(folder, f"{name}.tmp") for name in names}
    paths, meta_path = (partial["train.bin"], partial["val.bin"]), os.path.join(folder, "meta.json")
    try:
        n_train, n_documents, cuts = write_tokens(paths[0], source, tokenizer, dtype, cfg.max_tokens)
        if n_train < 2:
            raise ValueError(f"{address} is empty (or max_tokens too small): it gives {n_train} tokens")
        if val_source:
            n_val, _, val_cuts = write_tokens(paths[1], val_source, tokenizer, dtype, None)
            if n_val == 0:
                raise ValueError(f"{val_address} is empty: it gives no tokens")
        else:
            n_train, n_val = split_tail(*paths, dtype, fraction, tokenizer.eot_token, cuts[:, 0])
            cuts, val_cuts = cuts[cuts[:, 3] <= n_train], cuts[cuts[:, 0] >= n_train] - n_train
        if has_problems:
            if not (len(cuts) and len(val_cuts)):
                raise ValueError(f"{address} has too few problems to train on some and hold out others")
            for split, array in {"train": cuts, "val": val_cuts}.items():
                with open(partial[f"{split}_cuts.npy"], "wb") as file:
                    np.save(file, array)
        meta = {"name": cfg.name, "source": stated[0], "val_source": stated[1]}
        meta |= {"documents": n_documents, "one_per_line": has_problems}
        meta |= {"vocab_size": spec["vocab_size"], "eot_id": tokenizer.eot_token, "dtype": dtype.name}
        meta["tokens"] = {"train": n_train, "val": n_val}
        meta["sha256"] = {name.split(".")[0]: file_sha256(path) for name, path in partial.items()}
        meta["tokenizer"] = spec
        with open(meta_path + ".tmp", "w") as file:
            json.dump(meta, file, indent=1)
        pathlib.Path(meta_path).unlink(missing_ok=True)  # until it is back the folder counts as not prepared
        for path in partial.values():
            os.replace(path, path.removesuffix(".tmp"))
        os.replace(meta_path + ".tmp", meta_path)
    finally:
        for path in partial.values():
            pathlib.Path(path).unlink(missing_ok=True)
    return meta


# ---------- Arithmetic: grade-school word problems. One line each: question||<<3+4=7>> <<7*2=14>> #### 14

NAMES = ["Tom", "Anna", "Ben", "Mia", "Sam", "Lily", "Max", "Zoe", "Leo", "Eva", "Jim", "Ada"]
THINGS = "apples books coins shells pens cards eggs stamps nuts keys cups hats".split()
# A question|its equations: a, b, c are the numbers of the question, x is the first result.
QUESTIONS = [
    "{name} has {a} {things} and buys {b} more. How many now?|a+b",
    "{name} has {a} {things} and gives {b} to {friend}. How many are left?|a-b",
    "{name} has {a} boxes of {b} {things}. How many in all?|a*b",
    "{name} shares {a} {things} among {b} children. How many for each?|a/b",
    "{name} has {a} {things}, finds {b} and loses {c}. How many now?|a+b|x-c",
    "{name} buys {a} bags of {b} {things} and loses {c}. How many are left?|a*b|x-c",
    "{name} has {a} {things}. {friend} has {b} times as many. How many together?|a*b|a+x",
    "{name} has {a} {things} and {friend} has {b}. They make {c} equal piles. How many in each?|a+b|x/c",
    "{name} has {a} {things}, sells {b} and fills {c} equal bags. How many in each?|a-b|x/c",
    "{name} has {a} {things} and loses {b}. {friend} has {c} times as many. How many is that?|a-b|x*c",
    "{name} shares {a} {things} among {b} boxes and adds {c} to each. How many in each?|a/b|x+c",
    "{name} shares {a} {things} among {b} plates and takes {c} from one. How many are left on it?|a/b|x-c",
]
TEMPLATES = [question.split("|") for question in QUESTIONS]


def make_problem(rng: random.Random) -> str:
    """One random problem. Its results are whole numbers from 1 to 20: small models learn them in minutes."""
    question, *equations = rng.choice(TEMPLATES)
    name, friend = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    while True:  # draw numbers until every result is whole and small
        numbers = {"a": rng.randint(2, 9), "b": rng.randint(2, 5), "c": rng.randint(2, 5)}
        thoughts = []
        for first, sign, second in equations:
            p, q = numbers[first], numbers[second]
            result = {"+": p + q, "-": p - q, "*": p * q, "/": p / q}[sign]
            if result != int(result) or not 1 <= result <= 20:
                break
            numbers["x"] = int(result)
            thoughts.append(f"<<{p}{sign}{q}={numbers['x']}>>")
        else:
            question = question.format(name=name, friend=friend, things=things, **numbers)
            return f"{question}||{' '.join(thoughts)} #### {numbers['x']}"


def write_arithmetic(folder, num_problems, seed):
    """Writes train.txt, and 1,000 lines of valid.txt and test.txt; no question twice. Returns two paths."""
    if not 1 <= num_problems <= 100_000:
        raise ValueError(f"num_problems is {num_problems}; the grammar is good for 1 to 100,000")
    rng = random.Random(seed)
    problems = {}  # a dict keeps the order, and a question only once
    while len(problems) < num_problems + 2000:
        problems[make_problem(rng)] = None
    lines = list(problems)
    rng.shuffle(lines)  # short templates run out of new questions: the last ones drawn are of another kind
    os.makedirs(folder, exist_ok=True)
    for split, part in {"train": lines[:-2000], "valid": lines[-2000:-1000], "test": lines[-1000:]}.items():
        path = os.path.join(folder, f"{split}.txt")
        with open(path + ".tmp", "w") as file:
            file.write("\n".join(part) + "\n")
        os.replace(path + ".tmp", path)
    return os.path.join(folder, "train.txt"), os.path.join(folder, "valid.txt")


def main():
    cfg, set_by = configurator.parse(PrepareConfig, positional="name")
    print(configurator.describe(cfg, set_by))
    start = time.time()
    meta = prepare(cfg)
    tokens, spec, seconds = meta["tokens"], meta["tokenizer"], time.time() - start
    rate = sum(tokens.values()) / seconds
    counts = f"{tokens['train']:,} training and {tokens['val']:,} validation tokens"
    vocabulary = f"{spec['name']} vocabulary of {spec['vocab_size']:,}"
    print(f"{cfg.data_dir}/{cfg.name}: {counts}, {vocabulary}, {seconds:.1f} s, {rate:,.0f} tokens/s")


if __name__ == "__main__":
    configurator.run(main)
