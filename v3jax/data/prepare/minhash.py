"""datatrove's MinHash steps on words of any script; it is imported with this module.

datatrove's own shingles need a model of the language for its words, and hash text by text; these
hash each word once and runs of words in NumPy.
"""

from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from v3jax.data.prepare.config import DedupConfig
from v3jax.data.prepare.words import hashes, run_hashes, words


class AnyScript(WordTokenizer):
    """Words without a model of the language; sentences are not asked for."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return words(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The text as one sentence."""
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """The span of that sentence."""
        return [(0, len(text))]


class Signatures(MinhashDedupSignature):
    """Writes signatures of word n-grams; a text of fewer words has none."""

    def get_shingles(self, text: str) -> np.ndarray:
        """Hashes of the text's distinct n-grams, uint64 `[n, 1]`."""
        found = self.word_tokenizer.word_tokenize(text)
        return np.unique(run_hashes(hashes(found), self.config.n_grams)).reshape(-1, 1)


def signatures(cfg: DedupConfig, folder: Path) -> Signatures:
    """The step that writes signatures."""
    # `language` takes a tokenizer too (load_word_tokenizer), though it is declared as a name.
    tokenizer: dict[str, Any] = {"language": AnyScript()}
    return Signatures(str(folder), _config(cfg), **tokenizer)


def buckets(cfg: DedupConfig, signed: Path, folder: Path) -> MinhashDedupBuckets:
    """The step that lists pairs of documents which meet in a bucket; a task for each bucket."""
    return MinhashDedupBuckets(str(signed), str(folder), config=_config(cfg))


def _config(cfg: DedupConfig) -> MinhashConfig:
    return MinhashConfig(
        n_grams=cfg.ngram,
        num_buckets=cfg.buckets,
        hashes_per_bucket=cfg.hashes,
        seed=cfg.seed,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # of texts, which is not used here
    )
