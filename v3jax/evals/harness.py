"""The language-model-evaluation-harness's view of a model (extra `eval`).

Texts are encoded as the harness's own `hf` class does with this tokenizer: no special tokens, and
the beginning-of-text token in place of an empty context. Likelihoods come from `scoring`, texts
from `decode.Engine`; finished requests may be kept in a file, which a repeated call reads.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from v3jax.decode import Engine
from v3jax.evals.scoring import Score, Scorer
from v3jax.models import Loaded

_ROWS = 16
"""Prompts continued side by side."""


class Answers:
    """Finished requests by a digest of the model and the request, one JSON line each."""

    def __init__(self, file: Path | None, model: str) -> None:
        self._file, self._model = file, model
        self._known: dict[str, Any] = {}
        if file is not None and file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):  # a last line may have been cut off
                    entry = json.loads(line)
                    self._known[entry["key"]] = entry["value"]

    def key(self, *request: Any) -> str:
        """What a request is kept under."""
        return hashlib.sha256(json.dumps([self._model, *request]).encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """The kept answer, or None."""
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        """Keeps an answer."""
        self._known[key] = value
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "value": value}) + "\n")


class Model(TemplateLM):
    """A model as the harness asks it.

    Args:
      max_length: tokens of context and continuation together, without the last.
      max_gen_tokens: the most tokens of a text where a task names no number.
    """

    def __init__(
        self, loaded: Loaded, answers: Answers, *, max_length: int, max_gen_tokens: int = 256
    ) -> None:
        super().__init__()
        self._tokenizer = loaded.tokenizer
        self._answers = answers
        self._max_length, self._max_gen_tokens = max_length, max_gen_tokens
        parts = (loaded.params, loaded.router_state)
        self._scorer = Scorer(loaded.model, loaded.numerics, *parts)
        self._engine = Engine(loaded.model, *parts, loaded.tokenizer, numerics=loaded.numerics)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del add_special_tokens, kwargs
        return self._tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        keys = [self._answers.key("score", c, t, self._max_length) for _, c, t in requests]
        open_ones = [i for i, key in enumerate(keys) if self._answers.get(key) is None]
        asked = [(requests[i][1], requests[i][2]) for i in open_ones]
        for number, score in self._scorer.score(asked, max_length=self._max_length):
            self._answers.put(keys[open_ones[number]], list(score))
        return [Score(*self._answers.get(key)) for key in keys]

    def loglikelihood_rolling(
        self, requests: Iterable[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        del disable_tqdm
        windows, counts = [], []
        for request in requests:
            some = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            )
            some = [(None, *utils.make_disjoint_window(window)) for window in some]
            windows += some
            counts.append(len(some))
        logs = iter([log for log, _ in self._loglikelihood_tokens(windows)])
        return [sum(next(logs) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        keys = [self._answers.key("text", *r.args, self._max_length) for r in requests]
        by_options: dict[str, list[int]] = {}
        for i, (request, key) in enumerate(zip(requests, keys, strict=True)):
            if self._answers.get(key) is None:
                by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        for options, numbers in by_options.items():
            prompts = {i: self.tok_encode(requests[i].args[0]) for i in numbers}
            numbers.sort(key=lambda i: -len(prompts[i]))
            for start in range(0, len(numbers), _ROWS):
                batch = numbers[start : start + _ROWS]
                texts = self._texts([prompts[i] for i in batch], json.loads(options))
                for i, text in zip(batch, texts, strict=True):
                    self._answers.put(keys[i], text)
        return [self._answers.get(key) for key in keys]

    def _texts(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
        """Continuations up to the first text of `until`; a sampled one depends on its place."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        length = int(options.get("max_gen_toks", self._max_gen_tokens))
        room = self._max_length - length
        if room < 1:
            raise ValueError(
                f"max_gen_toks={length} leaves no room for a prompt in {self._max_length} tokens"
            )
        sampled = options.get("do_sample", False)
        rows, _ = self._engine.generate(
            [prompt[-room:] or [self.prefix_token_id] for prompt in prompts],
            max_tokens=length,
            temperature=float(options.get("temperature", 0.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            stop=until,
        )
        return [_before(self._tokenizer.decode(row.ids), until) for row in rows]


def _before(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
