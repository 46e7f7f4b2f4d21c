"""What a corpus is prepared from and how, as frozen dataclasses.

`python -m v3jax.data.prepare` takes a registered experiment, whose sources become these, or a
Python file of your own whose function `prepare` returns a `PrepareConfig`; `--set` adjusts both.
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from v3jax.config import DataConfig, ExperimentConfig

Kind = Literal["prose", "web", "code", "maths"]
_EMBEDDED_KINDS: dict[str, Kind] = {"pydoc_topics": "prose", "arithmetic": "maths"}


def _require(ok: bool, field: str, remedy: str) -> None:
    if not ok:
        raise ValueError(f"{field}: {remedy}")


@dataclass(frozen=True, kw_only=True)
class PrepareSource:
    """One source of texts.

    `path` is a file, directory or glob of .jsonl, .parquet, text and HTML files, or, for the kind
    `code`, a tree of program sources; without it `name` is an embedded source of `data.sources`.
    """

    name: str
    kind: Kind
    """Which quality rules its documents meet, and whether their Unicode is repaired (not code)."""
    path: str | None = None
    text_field: str = "text"
    weight: float = 1.0
    """Its share of the rows drawn in training; nothing here depends on it."""
    max_mb: float | None = None
    """Cap on the text that is kept, taken in the order of content hashes."""
    languages: tuple[str, ...] = ()
    """Languages to keep (ISO 639-1); empty keeps all."""
    rules: bool = True
    """Whether the quality rules of its kind apply."""

    def __post_init__(self) -> None:
        _require(bool(self.name), "sources.name", "must not be empty")
        _require(self.weight > 0, f"sources[{self.name}].weight", "must be positive")
        _require(
            self.max_mb is None or self.max_mb > 0,
            f"sources[{self.name}].max_mb",
            "must be positive, or None for no cap",
        )


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Exact and MinHash deduplication over all sources, the first of which keeps a text.

    Two documents with Jaccard similarity s of their word n-grams meet with probability
    `1 - (1 - s**hashes)**buckets`.
    """

    exact: bool = True
    minhash: bool = True
    ngram: int = 5
    buckets: int = 14
    hashes: int = 8
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("ngram", "buckets", "hashes"):
            _require(getattr(self, name) >= 1, f"dedup.{name}", "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Bounds of the quality rules that differ between corpora; the others stand with the rules."""

    min_words: int = 50
    """Of a document of prose or web (Gopher, arXiv 2112.11446, appendix A.1)."""

    def __post_init__(self) -> None:
        _require(self.min_words >= 0, "quality.min_words", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """Removal of evaluation text: documents that share `ngram` words in a row with an item.

    `paths` are .jsonl (also .gz) and text files, or folders of them; `package:NAME/FILE` is a file
    inside an installed package. Every string of a record and every paragraph of a text is an item.
    """

    paths: tuple[str, ...] = ()
    ngram: int = 13
    shortest: int = 5
    """Items of fewer words are not looked for; those of fewer than `ngram` must occur whole."""
    action: Literal["drop", "cut"] = "drop"
    """`cut` removes the lines that the hit touches and keeps the rest of the document."""

    def __post_init__(self) -> None:
        _require(
            1 <= self.shortest <= self.ngram,
            "decontaminate.shortest",
            f"must be within 1..ngram={self.ngram}",
        )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """A linear classifier trained from seeds, which then recalls more of their kind.

    As in DeepSeekMath (arXiv 2402.03300, section 2.1), in miniature: train on seeds, score the
    corpus, take its best documents as further seeds, and so on. Off without `positives`.
    """

    positives: str | None = None
    """Path of documents that are wanted."""
    negatives: str | None = None
    """Path of documents that are not; None takes random documents of the corpus."""
    text_field: str = "text"
    sources: tuple[str, ...] = ()
    """Names of the sources that are judged; empty judges those of the kind `web`."""
    rounds: int = 2
    recall_share: float = 0.05
    """Share of the judged documents that each round adds to its seeds."""
    keep_share: float | None = 0.5
    """Best share of the judged documents that is kept; None keeps by `keep_score`."""
    keep_score: float = 0.5
    ngram: int = 2
    n_features: int = 2**18
    epochs: int = 5
    learning_rate: float = 0.5
    max_seeds: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rounds", "ngram", "n_features", "epochs", "max_seeds"):
            _require(getattr(self, name) >= 1, f"classifier.{name}", "must be at least 1")
        _require(0 < self.recall_share < 1, "classifier.recall_share", "must be between 0 and 1")
        _require(
            self.keep_share is None or 0 < self.keep_share <= 1,
            "classifier.keep_share",
            "must be within 0..1, or None to keep by classifier.keep_score",
        )


@dataclass(frozen=True, kw_only=True)
class QuarantineConfig:
    """How much that cannot be read is put aside before the run stops."""

    max_documents: int | None = None
    max_share: float = 0.01
    """Of the documents read."""
    max_document_mb: float = 32.0
    """A larger document is put aside."""

    def __post_init__(self) -> None:
        _require(0 <= self.max_share <= 1, "quarantine.max_share", "must be within 0..1")
        _require(self.max_document_mb > 0, "quarantine.max_document_mb", "must be positive")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """A whole preparation as one value."""

    sources: tuple[PrepareSource, ...]
    heldout_fraction: float = 0.01
    n_tasks: int = 8
    """Pieces the work is cut into; no output depends on it."""
    dedup: DedupConfig = DedupConfig()
    quality: QualityConfig = QualityConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    quarantine: QuarantineConfig = QuarantineConfig()
    tokenizer: str | None = None
    """A tokenizer.json or its folder; None trains one on what is kept."""
    tokenizer_vocab_size: int = 128_000
    tokenizer_mb: float = 256.0
    """Text that a tokenizer is trained on, in the order of content hashes."""
    shard_mb: float = 256.0
    """A shard is closed before its records exceed this."""
    examples: int = 5
    """Dropped documents that the report shows for each reason."""

    def __post_init__(self) -> None:
        _require(len(self.sources) > 0, "sources", "the corpus is empty; name a source")
        names = [source.name for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        _require(twice is None, "sources", f"{twice!r} stands there twice; rename one")
        _require(
            0 <= self.heldout_fraction < 1, "heldout_fraction", "must be within 0..1, 1 excluded"
        )
        _require(self.n_tasks >= 1, "n_tasks", "must be at least 1")
        _require(self.shard_mb > 0, "shard_mb", "must be positive")
        _require(self.tokenizer_mb > 0, "tokenizer_mb", "must be positive")
        _require(self.examples >= 0, "examples", "must not be negative")
        strange = set(self.classifier.sources) - set(names)
        _require(
            not strange, "classifier.sources", f"no source is called {min(strange, default='')}"
        )

    @property
    def judged(self) -> tuple[int, ...]:
        """Places of the sources that the classifier judges."""
        if self.classifier.positives is None:
            return ()
        chosen = self.classifier.sources
        return tuple(
            i
            for i, source in enumerate(self.sources)
            if (source.name in chosen if chosen else source.kind == "web")
        )


def of_experiment(cfg: ExperimentConfig) -> PrepareConfig:
    """The preparation of an experiment's sources, for its tokenizer."""
    return PrepareConfig(
        sources=tuple(_sources(cfg.data)),
        heldout_fraction=cfg.data.heldout_fraction,
        tokenizer=cfg.data.tokenizer,
        tokenizer_vocab_size=cfg.data.tokenizer_vocab_size,
    )


def _sources(data: DataConfig) -> Iterable[PrepareSource]:
    if data.path is not None:
        yield PrepareSource(
            name="user", kind="prose", path=data.path, text_field=data.text_field, rules=False
        )
        return
    for source in data.sources:
        kind: Kind = "prose" if source.path else _EMBEDDED_KINDS.get(source.name, "code")
        yield PrepareSource(
            name=source.name,
            kind=kind,
            path=source.path,
            text_field=source.text_field,
            weight=source.weight,
            max_mb=source.max_mb,
            rules=source.path is None,
        )


def of_file(path: Path) -> PrepareConfig:
    """What the function `prepare` of a Python file returns.

    Raises:
      ValueError: no such file, no such function, or one that fails or returns something else.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"v3jax_user_prepare_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        found = module.prepare()
    except AttributeError as error:
        raise ValueError(f"--config {path}: {error}; define prepare()") from None
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"--config {path}: {type(error).__name__}: {text}") from error
    if not isinstance(found, PrepareConfig):
        raise ValueError(f"--config {path}: prepare() returns no PrepareConfig")
    return found
