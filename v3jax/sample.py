"""Continues prompts, or chats, with a trained model.

python -m v3jax.sample --ckpt=runs/v3_tiny --prompt="def " [--ema] [--tokens=64] [--speculative]
python -m v3jax.sample --ckpt=DeepSeek-V3/ --chat [--prompt="Hello"] [--temperature=0.7]
python -m v3jax.sample --ckpt=runs/v3_tiny --prompts-file=prompts.txt
python -m v3jax.sample --ckpt=runs/v3_tiny --prompt="def " --redundant=placement.json

`--ckpt` is a run directory, a Hugging Face directory or a conversion of one. `--redundant` takes
the copies of experts that `python -m v3jax.eplb --out` planned; the text is the same.
"""

import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags, logging

from v3jax import cli, host
from v3jax.data.chat import ChatTemplate
from v3jax.data.tokenizer import StreamDecoder
from v3jax.decode import Engine, Stats
from v3jax.decode.engine import OnTokens
from v3jax.eplb import Placement, read_placement
from v3jax.models import Loaded, open_model

_CKPT = flags.DEFINE_string("ckpt", None, "Run directory, Hugging Face directory or conversion.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue, or what the user says.")
_PROMPTS = flags.DEFINE_string("prompts-file", None, "UTF-8 file with one prompt a line.")
_CHAT = flags.DEFINE_bool("chat", False, "Use the chat template; without --prompt, ask for turns.")
_SYSTEM = flags.DEFINE_string("system", None, "System message of a chat.")
_SPECULATIVE = flags.DEFINE_bool("speculative", False, "Draft tokens with the MTP modules.")
_REDUNDANT = flags.DEFINE_string("redundant", None, "Placement of experts, by v3jax.eplb --out.")
_EMA = flags.DEFINE_bool("ema", False, "Use a run's averaged weights.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Most tokens to generate.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest.", lower_bound=0.0)
_TOP_K = flags.DEFINE_integer("top-k", 0, "Only the k likeliest tokens; 0 for all.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top-p", 1.0, "Only the likeliest that hold this share.")
_STOP = flags.DEFINE_multi_string("stop", [], "A text that ends the answer; repeat for more.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_BATCH = flags.DEFINE_integer("batch", 8, "Prompts of a file run together.", lower_bound=1)


class Sampler:
    """A model with the options of this call; adds up what its generations took."""

    def __init__(self, loaded: Loaded, placement: Placement | None = None) -> None:
        self.tokenizer = loaded.tokenizer
        self.chat = ChatTemplate(loaded.chat_template, loaded.tokenizer) if _CHAT.value else None
        self._engine = Engine(
            loaded.model,
            loaded.params,
            loaded.router_state,
            loaded.tokenizer,
            numerics=loaded.numerics,
            speculative=_SPECULATIVE.value,
            placement=placement,
        )
        self.stats = Stats()

    def ids_of(self, prompt: str) -> list[int]:
        """A prompt's ids, without special tokens; an empty one starts from `<bos>`."""
        if self.chat is not None:
            return self.chat.encode(conversation(prompt))
        return self.tokenizer.encode(prompt) or [self.tokenizer.bos]

    def texts(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """The continuations of several prompts."""
        out = self._run(prompts, None)
        return [self.tokenizer.decode(ids) for ids in out]

    def stream(self, prompt: Sequence[int]) -> str:
        """Prints a continuation as it comes; returns its text."""
        decoder = StreamDecoder(self.tokenizer)
        pieces: list[str] = []

        def show(text: str) -> None:
            pieces.append(text)
            print(text, end="", flush=True)

        self._run([prompt], lambda _, ids: show(decoder.push(ids)))
        show(decoder.flush())
        print(flush=True)
        return "".join(pieces)

    def _run(self, prompts: Sequence[Sequence[int]], on_tokens: OnTokens | None) -> list[list[int]]:
        out, stats = self._engine.generate(
            prompts,
            max_tokens=_TOKENS.value,
            temperature=_TEMPERATURE.value,
            top_k=_TOP_K.value,
            top_p=_TOP_P.value,
            seed=_SEED.value,
            stop=_STOP.value,
            on_tokens=on_tokens,
        )
        self.stats = self.stats + stats
        return [one.ids for one in out]


def conversation(prompt: str) -> list[dict[str, str]]:
    """A first turn, behind the system message if there is one."""
    system = [{"role": "system", "content": _SYSTEM.value}] if _SYSTEM.value else []
    return [*system, {"role": "user", "content": prompt}]


_fail = functools.partial(cli.fail, "sample")


def main(argv: Sequence[str]) -> int:
    """Parses, generates; 2 for a mistake in the call, 1 for a model that cannot be used."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {' '.join(argv[1:])}; options start with --", cli.USAGE)
    if _CKPT.value is None:
        return _fail("--ckpt=DIRECTORY is missing", cli.USAGE)
    if _PROMPT.value is not None and _PROMPTS.value is not None:
        return _fail("--prompt and --prompts-file exclude each other", cli.USAGE)
    texts = [_PROMPT.value or "", _SYSTEM.value or "", *_STOP.value]
    if not all(_is_text(text) for text in texts):
        return _fail("--prompt is not valid UTF-8; use a UTF-8 terminal", cli.USAGE)
    if not 0 < _TOP_P.value <= 1:
        return _fail(f"--top-p={_TOP_P.value}: must be within 0..1, 0 left out", cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    host.prepare()
    try:
        prompts = None if _PROMPTS.value is None else read_prompts(Path(_PROMPTS.value))
        placement = None if _REDUNDANT.value is None else read_placement(_REDUNDANT.value)
        sampler = Sampler(open_model(_CKPT.value, ema=_EMA.value), placement)
        if prompts is not None:
            _continue_all(sampler, prompts)
        elif sampler.chat is not None and _PROMPT.value is None:
            _talk(sampler, sampler.chat)
        else:
            prompt = _PROMPT.value or ""
            if not _CHAT.value:
                print(prompt, end="", flush=True)
            sampler.stream(sampler.ids_of(prompt))
    except (ValueError, OSError) as error:
        return _fail(error, cli.UNUSABLE)
    print(summary(sampler.stats))
    return 0


def _is_text(argument: str) -> bool:
    """Whether the argument's bytes were valid UTF-8; Python keeps others as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def read_prompts(file: Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      ValueError: no such file, not UTF-8, or no prompt in it.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts-file: {file} cannot be read as UTF-8 ({error})") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts-file: {file} holds no prompt; write one a line")
    return prompts


def _continue_all(sampler: Sampler, prompts: list[str]) -> None:
    for start in range(0, len(prompts), _BATCH.value):
        some = prompts[start : start + _BATCH.value]
        texts = sampler.texts([sampler.ids_of(prompt) for prompt in some])
        for prompt, text in zip(some, texts, strict=True):
            print(f">>> {prompt}\n{text}\n", flush=True)


def _talk(sampler: Sampler, chat: ChatTemplate) -> None:
    """A conversation with whoever types; an empty line or the end of input ends it."""
    messages: list[dict[str, str]] = []
    for line in _turns():
        messages += [{"role": "user", "content": line}] if messages else conversation(line)
        answer = sampler.stream(chat.encode(messages))
        messages.append({"role": "assistant", "content": answer})


def _turns() -> Iterator[str]:
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            return
        yield line.rstrip("\n")


def summary(stats: Stats) -> str:
    """One line on speed and, where tokens were drafted, on how many were right."""
    line = f"{stats.generated} tokens, {stats.tokens_per_second:.1f} tokens/s after the first"
    line += ", compilation included"
    if stats.drafted:
        line += (
            f"; {stats.acceptance_rate:.1%} of drafted tokens accepted, "
            f"{stats.tokens_per_step:.2f} tokens a step of the main model"
        )
    return line


if __name__ == "__main__":
    cli.run("sample", main)
