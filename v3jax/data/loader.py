"""From the corpus to batches: rows cached on disk, a mixture that resumes bit for bit.

Rows are encoded, put in fill-in-the-middle form, packed by source and cached under a digest of
everything that shapes them. The loader draws rows from the sources in the ratio of their weights,
each source shuffled anew every epoch, and its whole state is a position.
Dims: N rows, M micro-batches, B sequences of one, S = T + 1 tokens of a row.
"""

import fcntl
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from v3jax.config import ExperimentConfig
from v3jax.data.corpus import Corpus, load_corpus
from v3jax.data.fim import encode_documents
from v3jax.data.packing import Rows, pack, read_rows, write_rows
from v3jax.data.sources import Document
from v3jax.data.tokenizer import SPLITS, Tokenizer, load_tokenizer, train_tokenizer
from v3jax.optim.schedules import batch_size

_CACHE_VERSION = 2  # of what is cached and how it is made; raised when either changes


def cache_folder() -> Path:
    """Where tokenizers, rows and compiled programs are kept: `V3JAX_CACHE` or `~/.cache/v3jax`."""
    return Path(os.environ.get("V3JAX_CACHE") or Path.home() / ".cache" / "v3jax")


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
    """Each source's share of the rows drawn."""
    heldout: Rows
    tokenizer: Tokenizer | None
    """None for synthetic data."""
    digest: str
    files: tuple[tuple[str, str, str], ...]
    """`(source, document name, sha256 of its text)`, held-out documents included."""
    sources: tuple[SourceReport, ...]
    isolate_documents: bool = False
    """Whether the first token of a document is no target (`DataConfig.isolate_documents`)."""

    @cached_property
    def fill_rate(self) -> float:
        """Share of row positions that hold a token."""
        used = sum(int((rows.segments_NS > 0).sum()) for rows in self.train)
        return used / sum(rows.segments_NS.size for rows in self.train)

    def heldout_bytes(self, n_rows: int) -> int:
        """UTF-8 bytes of the targets in the first `n_rows` held-out rows; specials have none."""
        if self.tokenizer is None:
            return 0
        tokens, segments = (x[:n_rows] for x in (self.heldout.tokens_NS, self.heldout.segments_NS))
        mask = segments[:, 1:] > 0
        if self.isolate_documents:
            mask &= segments[:, 1:] == segments[:, :-1]
        return int(self.tokenizer.byte_lengths[tokens[:, 1:][mask]].sum())

    def heldout_text(self, n_rows: int) -> bytes:
        """The bytes of the first `n_rows` held-out rows, for compressors."""
        if self.tokenizer is None:
            return b""
        tokens = self.heldout.tokens_NS[:n_rows][self.heldout.segments_NS[:n_rows] > 0]
        return b"".join(self.tokenizer.token_bytes[i] for i in tokens)


def open_dataset(cfg: ExperimentConfig, cache: Path | None = None) -> Dataset:
    """The experiment's dataset, from the cache or made and put there.

    Raises:
      ValueError: a corpus, tokenizer or cache that cannot be used; see `corpus` and `tokenizer`.
    """
    if cfg.data.synthetic:
        return _synthetic(cfg)
    corpus = load_corpus(cfg.data)
    cache = cache_folder() if cache is None else cache
    try:
        tokenizer = _tokenizer(cfg, corpus, cache)
        key, rows = _rows(cfg, corpus, tokenizer, cache)
    except OSError as error:
        raise ValueError(
            f"{cache}: the cache cannot be written ({error.strerror}); set V3JAX_CACHE"
        ) from None
    train = tuple(rows[f"train_{i}"] for i in range(len(corpus.sources)))
    return Dataset(
        train=train,
        weights=tuple(s.weight for s in corpus.sources),
        heldout=rows["heldout"],
        tokenizer=tokenizer,
        digest=key,
        files=corpus.files,
        sources=_report(corpus, train),
        isolate_documents=cfg.data.isolate_documents,
    )


def _tokenizer(cfg: ExperimentConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    if cfg.data.tokenizer is None:
        return _trained_tokenizer(cfg, corpus, cache)
    tokenizer = load_tokenizer(cfg.data.tokenizer)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"{cfg.data.tokenizer}: {tokenizer.vocab_size} ids exceed "
            f"model.vocab_size={cfg.model.vocab_size}; raise it or choose another tokenizer"
        )
    return tokenizer


def _trained_tokenizer(cfg: ExperimentConfig, corpus: Corpus, cache: Path) -> Tokenizer:
    """The tokenizer of the training documents: from the cache, or trained and put there."""
    size, library = cfg.data.tokenizer_vocab_size, importlib.metadata.version("tokenizers")
    key = _key(_CACHE_VERSION, library, SPLITS, size, corpus.train_digest)
    file = cache / "tokenizers" / f"{key}.json"
    if (found := _read_tokenizer(file)) is not None:
        return found
    with _alone(file):
        if (found := _read_tokenizer(file)) is not None:
            return found
        texts = (d.text for documents in corpus.train for d in documents)
        tokenizer = train_tokenizer(texts, size)
        partial = file.with_suffix(".partial")
        partial.write_text(f"{tokenizer.digest}\n{tokenizer.text}", encoding="utf-8")
        partial.replace(file)
        return tokenizer


def _read_tokenizer(file: Path) -> Tokenizer | None:
    """The tokenizer in a cached file; None unless it is there, bit for bit."""
    try:
        digest, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        return None
    return Tokenizer(text, str(file))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Makes processes that would write `path` wait for each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _key(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _rows(
    cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer, cache: Path
) -> tuple[str, dict[str, Rows]]:
    """The rows and their key: from the cache, or made and put there."""
    data = cfg.data
    shape = (data.seq_len, data.fim_rate, data.newline_split_rate, cfg.run.seed)
    key = _key(_CACHE_VERSION, corpus.digest, tokenizer.digest, shape)
    folder = cache / "rows" / key
    rows = read_rows(folder)
    if rows is None:
        with _alone(folder):
            rows = read_rows(folder)
            if rows is None:
                write_rows(folder, _encode_all(cfg, corpus, tokenizer))
                rows = read_rows(folder)
    if rows is None:
        raise ValueError(f"{folder}: reads back other than it was written; check the disk")
    for name, part in rows.items():
        _check_ids(part, cfg.model.vocab_size, f"{folder}/{name}_tokens.npy")
    return key, rows


def _encode_all(cfg: ExperimentConfig, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Rows]:
    """Rows by name. Held-out text is encoded as it is: no FIM, no random splitting."""
    data = cfg.data

    def packed(documents: Iterable[Document], fim_rate: float, newline_split_rate: float) -> Rows:
        ids = encode_documents(
            tokenizer,
            [d.text for d in documents],
            seed=cfg.run.seed,
            fim_rate=fim_rate,
            newline_split_rate=newline_split_rate,
        )
        return pack(list(ids), data.seq_len + 1, tokenizer.pad)

    rows = {
        f"train_{i}": packed(documents, data.fim_rate, data.newline_split_rate)
        for i, documents in enumerate(corpus.train)
    }
    held = packed((d for documents in corpus.heldout for d in documents), 0.0, 0.0)
    order_N = np.random.default_rng(0).permutation(len(held.tokens_NS))  # a prefix is a fair sample
    rows["heldout"] = Rows(held.tokens_NS[order_N], held.segments_NS[order_N])
    return rows


def _check_ids(rows: Rows, vocab_size: int, file: str) -> None:
    """Raises ValueError if a row holds an id outside the vocabulary; names the first."""
    bad_N = ((rows.tokens_NS < 0) | (rows.tokens_NS >= vocab_size)).any(axis=1)
    if bad_N.any():
        row = int(bad_N.argmax())
        ids = rows.tokens_NS[row]
        first = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(
            f"{file}: row {row} holds token id {first}, outside model.vocab_size={vocab_size}; "
            "raise it or retrain the tokenizer"
        )


def _report(corpus: Corpus, train: tuple[Rows, ...]) -> tuple[SourceReport, ...]:
    return tuple(
        SourceReport(
            name=source.name,
            weight=source.weight,
            documents=len(documents),
            megabytes=sum(len(d.text.encode()) for d in documents) / 1e6,
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
