"""The language-model-evaluation-harness's view of a model (extra `eval`).

Texts are encoded as the harness's own `hf` class does with this tokenizer: no special tokens, and
the beginning-of-text token in place of an empty context. A chat's text is the template's, whose
control tokens count. Likelihoods come from `scoring`, texts from `decode.Engine`; finished requests
may be kept in a file, which a repeated call reads.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from v3jax.data.chat import ChatTemplate
from v3jax.decode import Engine
from v3jax.evals.scoring import Score, Scorer
from v3jax.models import Loaded

_ROWS = 32
"""The most prompts continued side by side."""
_SEED = 1234  # of the examples that the harness's own tasks draw, its default
_NEW_TOKENS = 256
"""The most tokens of a text where a task names no number."""


class Answers:
    """Finished requests by a digest of the model and the request, one JSON line each."""

    def __init__(self, file: Path | None, model: str) -> None:
        self._file, self._model = file, model
        self._known: dict[str, Any] = {}
        if file is not None and file.exists():
            text = file.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # the last line was cut off
                text = text[: text.rfind("\n") + 1]
                file.write_text(text, encoding="utf-8")
            for line in text.splitlines():
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
      truncate: takes the end of a text that is longer, as the harness's own classes do; False
        refuses it.
      chat: puts prompts in the model's chat template.
      max_new_tokens: the most tokens of a text, however many a task asks for.
    """

    def __init__(
        self,
        loaded: Loaded,
        answers: Answers,
        *,
        max_length: int,
        truncate: bool = False,
        chat: bool = False,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self._tokenizer = loaded.tokenizer
        self._chat = ChatTemplate(loaded.chat_template, loaded.tokenizer) if chat else None
        self._template = loaded.chat_template
        self._answers = answers
        self._max_length, self._max_new_tokens = max_length, max_new_tokens
        self._truncate = truncate
        parts = (loaded.params, loaded.router_state)
        self._engine = Engine(loaded.model, *parts, loaded.tokenizer, numerics=loaded.numerics)
        self._scorer = Scorer(loaded.model, loaded.numerics, *parts)

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
        if self._chat is not None:
            return self._tokenizer.encode_with_controls(string)
        return self._tokenizer.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        assert self._chat is not None, "asked for a chat without chat=True"
        return self._chat.render(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str:
        del chat_template
        return self._template

    @property
    def tokenizer_name(self) -> str:
        return "v3jax"

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, Sequence[int], Sequence[int]]],
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        for _, context, continuation in requests:
            self._check(len(context) + len(continuation) - 1)
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
        keys = []
        asked: Counter[str] = Counter()  # a request that is repeated asks for another sample
        groups: dict[tuple[str, int], list[int]] = {}
        for i, request in enumerate(requests):
            prompt, own = _text_and_options(request)
            options = json.dumps(own, sort_keys=True)
            repeat = asked[prompt + options]
            asked[prompt + options] += 1
            limits = (self._max_length, self._max_new_tokens)
            keys.append(self._answers.key("text", prompt, options, repeat, *limits))
            if self._answers.get(keys[-1]) is None:
                groups.setdefault((options, repeat), []).append(i)
        for (options, repeat), numbers in groups.items():
            prompts = {i: self.tok_encode(_text_and_options(requests[i])[0]) for i in numbers}
            numbers.sort(key=lambda i: -len(prompts[i]))
            # Batches alike: programs are compiled for a number of rows.
            width = -(-len(numbers) // -(-len(numbers) // _ROWS))
            for start in range(0, len(numbers), width):
                batch = numbers[start : start + width]
                texts = self._texts([prompts[i] for i in batch], json.loads(options), repeat, width)
                for i, text in zip(batch, texts, strict=True):
                    self._answers.put(keys[i], text)
        return [self._answers.get(key) for key in keys]

    def _texts(
        self, prompts: Sequence[list[int]], options: dict[str, Any], seed: int, width: int
    ) -> list[str]:
        """Continuations up to the first text of `until`; a sampled one depends on its place."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [text for text in until if text]
        length = int(options.get("max_gen_toks", _NEW_TOKENS))
        length = min(length, self._max_new_tokens or length)
        longest = max(len(prompt) for prompt in prompts)
        self._check(longest + length)
        room = self._max_length - length
        if room < 1:
            raise ValueError(
                f"max_gen_toks={length} leaves no room for a prompt in {self._max_length} tokens; "
                "lower it with --max-new-tokens"
            )
        sampled = options.get("do_sample", False)
        rows, _ = self._engine.generate(
            [prompt[-room:] or [self.prefix_token_id] for prompt in prompts],
            max_tokens=length,
            width=width,
            temperature=float(options.get("temperature", 0.0)) if sampled else 0.0,
            top_p=float(options.get("top_p", 1.0)),
            top_k=int(options.get("top_k", 0)),
            seed=seed,
            stop=until,
        )
        return [_before(self._tokenizer.decode(row.ids), until) for row in rows]

    def _check(self, length: int) -> None:
        if length > self._max_length and not self._truncate:
            raise ValueError(
                f"a request of {length} tokens exceeds the model's context of {self._max_length}; "
                "--truncate keeps the end of what is too long"
            )


def _text_and_options(request: Instance) -> tuple[str, dict[str, Any]]:
    args: Any = request.args
    return args[0], args[1]


def _before(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    for stop in stops:
        text = text.split(stop)[0]
    return text


def run(
    model: Model, tasks: Any, *, limit: int | None = None, chat: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The harness's results on tasks as `TaskManager.load` gives them, and each record with what
    the model answered."""
    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    found: Any = evaluator.evaluate(
        model, tasks, limit=limit, apply_chat_template=chat, bootstrap_iters=1000
    )
    samples = found.pop("samples", {})
    kept = ("results", "groups", "n-samples", "configs", "versions", "higher_is_better")
    return (
        {key: found[key] for key in kept if key in found},
        [{"task": name} | sample for name, some in samples.items() for sample in some],
    )
