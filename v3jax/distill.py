"""Reasoning data from an expert, and fine-tuning on it (report section 5.1).

    python -m v3jax.distill --expert=runs/expert --problems=chains --out=runs/distilled
    python -m v3jax.distill --expert=runs/expert --problems=maths.jsonl --out=runs/distilled \\
        --then=v3_tiny_sft --before=runs/v3_tiny_sft --test=held_out.jsonl

Samples go to `chats.jsonl` (`v3jax.reasoning`). With `--then` an experiment is fine-tuned on its
own conversations and these, in `OUT/sft`, and how many held-out problems are solved is measured
before and after, with and without the system prompt; `report.html` and `report.json` have the
figures. Started again, the command goes on where it was.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import flags, logging

from v3jax import cli, config, host, registry
from v3jax.config import ExperimentConfig
from v3jax.data import instructions
from v3jax.reasoning import EMBEDDED, Distilled, Sampling, distil, loop, problems_named, with_chats

_EXPERT = flags.DEFINE_string("expert", None, "Run directory, Hugging Face directory, conversion.")
_PROBLEMS = flags.DEFINE_string("problems", None, "A .jsonl file, or `chains` or `forms`.")
_OUT = flags.DEFINE_string("out", None, "Folder of what is written.")
_RULE = flags.DEFINE_string("rule", "final_number", "Of problems in a file that name none.")
_LIMIT = flags.DEFINE_integer("limit", 1000, "Problems that are asked, the first.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 8, "Answers to each problem.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Of the draws.", lower_bound=0.0)
_TOP_P = flags.DEFINE_float("top-p", 1.0, "Only the likeliest that hold this share.")
_TOKENS = flags.DEFINE_integer("tokens", 128, "Most tokens of an answer.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_SYSTEM = flags.DEFINE_string("system", instructions.THINK, "System prompt that asks to reason.")
_THEN = flags.DEFINE_string("then", None, "Experiment to fine-tune on its data and these.")
_SET = flags.DEFINE_multi_string("then-set", [], "path.to.field=value of that experiment.")
_BEFORE = flags.DEFINE_string("before", None, "Fine-tuned model to compare with.")
_TEST = flags.DEFINE_string("test", None, "Problems to compare on; default --problems' own kind.")
_TEST_LIMIT = flags.DEFINE_integer("test-limit", 200, "Problems of --test.", lower_bound=1)


def _say(distilled: Distilled) -> None:
    print(
        f"{distilled.answers:,} answers to {distilled.problems:,} problems: "
        f"{distilled.pass_rate:.1%} right, {distilled.solved:,} problems solved; kept ones have "
        f"{distilled.tokens_kept:.0f} tokens, original ones {distilled.tokens_original:.0f}"
    )


_fail = functools.partial(cli.fail, "distill")


@dataclass(frozen=True)
class Call:
    """What the command line asks for."""

    expert: str
    problems: str
    out: Path
    then: ExperimentConfig | None
    before: str | None


def _asked(argv: Sequence[str]) -> Call:
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {' '.join(argv[1:])}; options start with --")
    expert, problems, out = _EXPERT.value, _PROBLEMS.value, _OUT.value
    if expert is None or problems is None or out is None:
        raise ValueError("--expert=MODEL, --problems=FILE and --out=FOLDER are all needed")
    if (_THEN.value is None) != (_BEFORE.value is None):
        raise ValueError("--then and --before belong together: give both or neither")
    then = None
    if _THEN.value is not None:
        then = config.override(registry.get(_THEN.value), _SET.value)
        with_chats(then, Path("chats.jsonl"))
        if _TEST.value is None and problems not in EMBEDDED:
            raise ValueError("--test=FILE is missing: problems to compare on")
    return Call(expert, problems, Path(out), then, _BEFORE.value)


def _run(call: Call, how: Sampling) -> None:
    call.out.mkdir(parents=True, exist_ok=True)
    problems = problems_named(call.problems, _RULE.value, _LIMIT.value)
    test = []
    if call.then is not None:
        kind = _TEST.value or call.problems
        test = problems_named(kind, _RULE.value, _TEST_LIMIT.value, "held_out")
    made = distil(call.expert, problems, call.out, how)
    _say(made)
    if call.then is None or call.before is None:
        print(f"done: {call.out / 'chats.jsonl'}")
        return
    figures = loop(call.then, made, call.before, test, call.out, how)
    for when in ("before", "after"):
        for asked, (rate, length) in figures[when].items():
            print(f"{when:7s} {asked:9s} {rate:6.1%} solved, {length:.0f} tokens an answer")
    print(f"done: {call.out / 'report.html'}")


def main(argv: Sequence[str]) -> int:
    """Parses, distils; 2 for a mistake in the call, 1 for anything that cannot be used."""
    try:
        call = _asked(argv)
    except ValueError as error:
        return _fail(error, cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    host.prepare()
    how = Sampling(
        samples=_SAMPLES.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        max_tokens=_TOKENS.value,
        seed=_SEED.value,
        system=_SYSTEM.value,
    )
    try:
        _run(call, how)
    except (ValueError, RuntimeError, OSError) as error:
        return _fail(error, cli.UNUSABLE)
    return 0


if __name__ == "__main__":
    cli.run("distill", main)
