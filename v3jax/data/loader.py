"""From the corpus to batches: rows cached on disk, a mixture that resumes bit for bit.

Rows are encoded, put in fill-in-the-middle form, packed by source and cached under a digest of
everything that shapes them. The loader draws rows from the sources in the ratio of their weights,
each source shuffled anew every epoch, and its whole state is a position.
Dims: N rows, M micro-batches, B sequences of one, S = T + 1 tokens of a row.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.corpus import Corpus, load_corpus
from v3jax.data.fim import encode_document
from v3jax.data.packing import pack
from v3jax.data.sources import Document
from v3jax.data.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from v3jax.optim.schedules import batch_size

_ROWS_VERSION = 1


def cache_folder() -> Path:
    """Where tokenizers, rows and compiled programs are kept: `V3JAX_CACHE` or `~/.cache/v3jax`."""
    return Path(os.environ.get("V3JAX_CACHE") or Path.home() / ".cache" / "v3jax")


@dataclass(frozen=True)
class Rows:
    """Packed rows `[N, S]` int32: ids, and segments with 0 for padding."""

    tokens_NS: np.ndarray
    segments_NS: np.ndarray


@dataclass(frozen=True)
class SourceReport:
    """What one source holds."""

    name: str
    weight: float
    documents: int
    megabytes: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class Dataset:
    """Rows to train on, by source, and rows held out."""

    train: tuple[Rows, ...]
    weights: tuple[float, ...]
    heldout: Rows
    tokenizer: Tokenizer | None
    """None for synthetic data."""
    digest: str
    files: tuple[tuple[str, str, str], ...]
    sources: tuple[SourceReport, ...]

    @cached_property
    def fill_rate(self) -> float:
        """Share of row positions that hold a token."""
        used = sum(int((rows.segments_NS > 0).sum()) for rows in self.train)
        return used / sum(rows.segments_NS.size for rows in self.train)

    def heldout_bytes(self, n_rows: int) -> int:
        """UTF-8 bytes of the targets in the first `n_rows` held-out rows; specials have none."""
        if self.tokenizer is None:
            return 0
        targets = self.heldout.tokens_NS[:n_rows, 1:][self.heldout.segments_NS[:n_rows, 1:] > 0]
        return int(self.tokenizer.byte_lengths[targets].sum())

    def heldout_text(self, n_rows: int) -> bytes:
        """The bytes of the first `n_rows` held-out rows, for compressors."""
        if self.tokenizer is None:
            return b""
        tokens = self.heldout.tokens_NS[:n_rows][self.heldout.segments_NS[:n_rows] > 0]
        return b"".join(self.tokenizer.token_bytes[i] for i in tokens)


def open_dataset(cfg: ExperimentConfig, cache: Path | None = None) -> Dataset:
    """The experiment's dataset, from the cache or made and put there.

    Raises:
      ValueError: a corpus or tokenizer that cannot be used; see `corpus` and `tokenizer`.
    """
    cache = cache_folder() if cache is None else cache
    if cfg.data.synthetic:
        return _synthetic(cfg)
    corpus = load_corpus(cfg.data)
    tokenizer = _tokenizer(cfg, corpus, cache)
    key = _rows_key(cfg, corpus, tokenizer)
    folder = cache / "rows" / key
    if not _is_whole(folder):
        _write_rows(folder, _encode_all(cfg, corpus, tokenizer))
    train = tuple(_read_rows(folder, f"train_{i}") for i in range(len(corpus.sources)))
    dataset = Dataset(
        train=train,
        weights=tuple(s.weight for s in corpus.sources),
        heldout=_read_rows(folder, "heldout"),
        tokenizer=tokenizer,
        digest=key,
        files=corpus.files,
        sources=_report(corpus, train),
    )
    _check_ids(cfg, dataset)
    return dataset


def _tokenizer(cfg: ExperimentConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    if cfg.data.tokenizer is None:
        texts = (d.text for documents in corpus.train for d in documents)
        return cached_tokenizer(texts, corpus.digest, cfg.data.tokenizer_vocab_size, cache)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"{cfg.data.tokenizer}: {tokenizer.vocab_size} ids exceed "
            f"model.vocab_size={cfg.model.vocab_size}; raise it or choose another tokenizer"
        )
    return tokenizer


def _rows_key(cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer) -> str:
    data = cfg.data
    shaping = (data.seq_len, data.fim_rate, data.newline_split_rate, data.heldout_fraction)
    parts = (_ROWS_VERSION, corpus.digest, tokenizer.digest, shaping, cfg.run.seed)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _encode_all(cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Rows]:
    """Rows by file name. Held-out text is encoded as it is: no FIM, no random splitting."""
    capacity = cfg.data.seq_len + 1
    rows = {}
    for i, documents in enumerate(corpus.train):
        ids = [_encode(cfg, tokenizer, document) for document in documents]
        rows[f"train_{i}"] = Rows(*pack(ids, capacity, tokenizer.pad))
    held = [d.text for documents in corpus.heldout for d in documents]
    plain = [np.array([*ids, tokenizer.eos], np.int32) for ids in tokenizer.encode_batch(held)]
    tokens_NS, segments_NS = pack(plain, capacity, tokenizer.pad)
    order_N = np.random.default_rng(0).permutation(len(tokens_NS))  # any prefix is a fair sample
    rows["heldout"] = Rows(tokens_NS[order_N], segments_NS[order_N])
    return rows


def _encode(cfg: ExperimentConfig, tokenizer: Tokenizer, document: Document) -> np.ndarray:
    """A training document's ids; its random choices depend on the seed and its text only."""
    seed = hashlib.sha256(f"{cfg.run.seed} {document.text}".encode(errors="surrogatepass"))
    ids = encode_document(
        tokenizer,
        document.text,
        fim_rate=cfg.data.fim_rate,
        newline_split_rate=cfg.data.newline_split_rate,
        rng=np.random.default_rng(int.from_bytes(seed.digest()[:8], "little")),
    )
    return np.array(ids, np.int32)


def _write_rows(folder: Path, rows: dict[str, Rows]) -> None:
    """Writes to a folder of another name and moves it into place; `rows.json` lists every file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    sizes = {}
    for name, part in rows.items():
        for kind, array in (("tokens", part.tokens_NS), ("segments", part.segments_NS)):
            file = temporary / f"{name}_{kind}.npy"
            np.save(file, array, allow_pickle=False)
            sizes[file.name] = file.stat().st_size
    (temporary / "rows.json").write_text(json.dumps(sizes))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:  # another process put the same rows there first
        shutil.rmtree(temporary)


def _is_whole(folder: Path) -> bool:
    index = folder / "rows.json"
    if not index.is_file():
        return False
    sizes = json.loads(index.read_text())
    files = ((folder / name, size) for name, size in sizes.items())
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def _read_rows(folder: Path, name: str) -> Rows:
    tokens, segments = (
        np.load(folder / f"{name}_{kind}.npy", mmap_mode="r", allow_pickle=False)
        for kind in ("tokens", "segments")
    )
    return Rows(tokens, segments)


def _check_ids(cfg: ExperimentConfig, dataset: Dataset) -> None:
    for rows in (*dataset.train, dataset.heldout):
        if rows.tokens_NS.size:
            low, high = int(rows.tokens_NS.min()), int(rows.tokens_NS.max())
            if low < 0 or high >= cfg.model.vocab_size:
                raise ValueError(
                    f"data: token id {low if low < 0 else high} is outside "
                    f"model.vocab_size={cfg.model.vocab_size}; raise it or retrain the tokenizer"
                )


def _report(corpus: Corpus, train: tuple[Rows, ...]) -> tuple[SourceReport, ...]:
    return tuple(
        SourceReport(
            name=source.name,
            weight=source.weight,
            documents=len(documents),
            megabytes=sum(len(d.text.encode(errors="surrogatepass")) for d in documents) / 1e6,
            tokens=int((rows.segments_NS > 0).sum()),
            rows=len(rows.tokens_NS),
        )
        for source, documents, rows in zip(corpus.sources, corpus.train, train, strict=True)
    )


def _synthetic(cfg: ExperimentConfig) -> Dataset:
    """Uniform random ids, as many rows as a few batches hold."""
    n_rows, capacity = 4 * cfg.batch.end, cfg.data.seq_len + 1
    rng = np.random.default_rng(cfg.run.seed)
    ids_NS = rng.integers(0, cfg.data.tokenizer_vocab_size, (n_rows, capacity)).astype(np.int32)
    rows = Rows(ids_NS, np.ones_like(ids_NS))
    report = SourceReport("synthetic", 1.0, n_rows, 0.0, ids_NS.size, n_rows)
    return Dataset((rows,), (1.0,), rows, None, f"synthetic-{cfg.run.seed}", (), (report,))


@dataclass(frozen=True)
class HostBatch:
    """One step's input, padded to the ramp's largest number of micro-batches.

    `tokens_MBS` and `segments_MBS` are int32; micro-batches from `n_micro` on are zeros.
    """

    tokens_MBS: np.ndarray
    segments_MBS: np.ndarray
    n_micro: int


class _RowSource:
    """Rows as a random-access source of (tokens, segments) pairs."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.tokens_NS)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self._rows.tokens_NS[index]), np.asarray(self._rows.segments_NS[index])


class Loader:
    """Endless batches whose size follows the ramp over the sequences already drawn."""

    def __init__(self, cfg: ExperimentConfig, dataset: Dataset) -> None:
        self.cfg = cfg
        self.digest = dataset.digest
        self.sequences = 0
        self._rows = iter(_mixture(cfg, dataset))

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        batch, data = self.cfg.batch, self.cfg.data
        size = batch_size(batch, self.sequences * data.seq_len)
        n_micro = size // batch.micro_batch
        shape = (batch.end // batch.micro_batch, batch.micro_batch, data.seq_len + 1)
        tokens_MBS, segments_MBS = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for m in range(n_micro):
            tokens_MBS[m], segments_MBS[m] = next(self._rows)
        self.sequences += size
        return HostBatch(tokens_MBS, segments_MBS, n_micro)

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: sequences drawn, the iterator's own state, the data's digest."""
        return {
            "sequences": self.sequences,
            "iterator": self._rows.get_state(),
            "digest": self.digest,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position.

        Raises:
          ValueError: the position belongs to other data.
        """
        if state["digest"] != self.digest:
            raise ValueError(
                f"data: the checkpoint was trained on rows {state['digest']}, the corpus now gives "
                f"{self.digest}; restore the corpus or start a new workdir"
            )
        self.sequences = state["sequences"]
        self._rows.set_state(state["iterator"])


def _mixture(cfg: ExperimentConfig, dataset: Dataset) -> Any:
    """Micro-batches of rows drawn from the sources by weight, each shuffled every epoch."""
    import grain

    sources = [
        (
            grain.MapDataset.source(_RowSource(rows)).seed(cfg.run.seed + i).shuffle().repeat(),
            weight,
        )
        for i, (rows, weight) in enumerate(zip(dataset.train, dataset.weights, strict=True))
        if len(rows.tokens_NS)
    ]
    rows = grain.MapDataset.mix([s for s, _ in sources], weights=[w for _, w in sources])
    batches = rows.batch(cfg.batch.micro_batch, drop_remainder=True)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def make_loader(cfg: ExperimentConfig, dataset: Dataset) -> Loader:
    """A loader at the start of the data's order."""
    return Loader(cfg, dataset)
