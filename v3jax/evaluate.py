"""Evaluates a model as the report does, and sets its figures beside the report's.

    python -m v3jax.evaluate --ckpt=runs/v3_tiny --tasks=held_out,acceptance
    python -m v3jax.evaluate --ckpt=runs/v3_tiny_ctx1k --tasks=needle [--max-length=N] [--yarn=off]
    python -m v3jax.evaluate --ckpt=runs/v3_tiny_sft --tasks=instructions
    python -m v3jax.evaluate --ckpt=DeepSeek-V3/ --tasks=mmlu,gsm8k --data=eval_data/ [--limit=100]
    python -m v3jax.evaluate --list

`held_out` (loss, bits a byte and expert load by source) and `acceptance` (of MTP drafts by source)
need nothing but the run. `needle` (section 4.3, figure 8) takes any model, at lengths beyond its
own too; a run's map goes into its report.html as well. `instructions` asks a fine-tuned model about
contents that no conversation of the embedded sources holds. All other tasks belong to the language
model evaluation harness (extra `eval`): one file for each row of the report's tables 3 and 6 in
`evals/tasks`, `harness:NAME` for one of its own, FILE.yaml for one of yours. They read JSON lines
from `--data` and never download.

Finished requests are kept beside the results: the same command goes on where it was interrupted.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath

from v3jax import cli, host
from v3jax.evals import catalogue

_CKPT = flags.DEFINE_string("ckpt", None, "Run directory, Hugging Face directory or conversion.")
_TASKS = flags.DEFINE_list("tasks", [], "Names of --list, harness:NAME or FILE.yaml.")
_DATA = flags.DEFINE_string("data", "eval_data", "Folder of the tasks' JSON lines.")
_OUT = flags.DEFINE_string("out", None, "Where results go; default evals/<checkpoint's name>.")
_LIMIT = flags.DEFINE_integer("limit", None, "Only the first records of each task.", lower_bound=1)
_EMA = flags.DEFINE_bool("ema", False, "Use a run's averaged weights.")
_CHAT = flags.DEFINE_bool("chat", False, "Put prompts in the chat template.")
_TRUNCATE = flags.DEFINE_bool("truncate", False, "Keep the end of what exceeds the context.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max-length", None, "Tokens of the longest request; default the model's context.", lower_bound=2
)
_MAX_NEW = flags.DEFINE_integer(
    "max-new-tokens", None, "At most so many new tokens of a text, whatever tasks ask for."
)
_NEEDLES = flags.DEFINE_integer(
    "needles", 4, "Contexts of a cell of the needle test.", lower_bound=1
)
_YARN = flags.DEFINE_string(
    "yarn", None, "YaRN of the needle test: off, or a factor (40 in the report), trained so or not."
)
_LIST = flags.DEFINE_bool("list", False, "List the tasks, their data and what cannot be run.")

_BUILT_IN = {
    "held_out": "loss, bits a byte and expert load on held-out documents by source",
    "acceptance": "MTP drafts that the main model takes, by source",
    "needle": "a fact in a long context is found, by length and depth, as in the report's figure 8",
    "instructions": "the embedded conversations' instructions, with unseen contents, by form",
}


_INSTRUCTIONS = 400
"""Problems of forms and of chains that `instructions` asks without --limit."""


def main(argv: Sequence[str]) -> int:
    """Parses, evaluates; 2 for a mistake in the call, 1 for anything that cannot be used."""
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments {' '.join(argv[1:])}; options start with --")
        if _LIST.value:
            print(listing(Path(_DATA.value)))
            return 0
        if _CKPT.value is None:
            raise ValueError("--ckpt=DIRECTORY is missing")
        if not _TASKS.value:
            raise ValueError("--tasks=NAME,... is missing; --list shows the tasks")
        tasks = [catalogue.resolve(name, _BUILT_IN) for name in _TASKS.value]
    except ValueError as error:
        return cli.fail("evaluate", error, cli.USAGE)
    logging.set_verbosity(logging.WARNING)
    host.prepare()
    out = Path(_OUT.value or Path("evals", Path(_CKPT.value.rstrip("/")).name or "model"))
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = evaluate(_CKPT.value, tasks, out)
    except (ValueError, OSError) as error:
        return cli.fail("evaluate", error, cli.UNUSABLE)
    (out / "results.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    print(f"done: {out / 'results.json'}")
    return 0


def evaluate(ckpt: str, tasks: Sequence[str], out: Path) -> dict[str, Any]:
    """Runs the tasks of this call and prints their tables; everything found, for `results.json`."""
    asked = [task for task in tasks if task not in _BUILT_IN]
    # Tasks and their data are looked at before weights are read.
    harness_tasks = catalogue.load(asked, Path(_DATA.value)) if asked else {}
    results: dict[str, Any] = {"ckpt": ckpt, "ema": _EMA.value, "limit": _LIMIT.value}
    if "held_out" in tasks:
        results["held_out"] = _held_out(ckpt, out)
    if "acceptance" in tasks:
        results["acceptance"] = _acceptance(ckpt)
    if "needle" in tasks:
        results["needle"] = _needle(ckpt, out)
    if "instructions" in tasks:
        results["instructions"] = _instructions(ckpt, out)
    if harness_tasks:
        results |= _harness(ckpt, harness_tasks, out)
    return results


def _held_out(ckpt: str, out: Path) -> list[dict[str, Any]]:
    from v3jax.evals.by_source import by_source, max_violation_global, specialisation
    from v3jax.report import specialisation_page

    found = by_source(ckpt, ema=_EMA.value)
    print(f"{'source':20s} {'documents':>9s} {'tokens':>9s} {'nats/token':>10s} {'bits/byte':>9s}")
    for one in found:
        print(
            f"{one.name:20s} {one.documents:9d} {one.tokens:9d} {one.loss:10.4f} "
            f"{one.bits_per_byte:9.4f}"
        )
    if found[0].load_LE.size:
        print(f"MaxViolation over all sources {max_violation_global(found):.3f}")
        loads = np.stack([one.load_LE for one in found]).astype(float)
        page = specialisation_page(ckpt, [one.name for one in found], loads)
        (out / "specialisation.html").write_text(page, encoding="utf-8")
        print(f"expert loads by source and layer: {out / 'specialisation.html'}")
    if found[0].load_LE.size and len(found) > 1:
        apart = specialisation(found)
        print(f"sources' expert loads differ by {apart:.3f} (0: alike, 1: no expert shared)")
    return [one.to_json() for one in found]


def _acceptance(ckpt: str) -> list[dict[str, Any]]:
    from v3jax.evals.acceptance import acceptance, overall

    found = acceptance(ckpt, ema=_EMA.value)
    print(f"{'source':20s} {'drafted':>9s} {'accepted':>9s} {'tokens a main step':>19s}")
    for one in found:
        print(f"{one.name:20s} {one.drafted:9d} {one.rate:9.1%} {one.tokens_per_step:19.2f}")
    print(f"{'all':20s} {sum(f.drafted for f in found):9d} {overall(found):9.1%}")
    return [vars(one) for one in found]


def _needle(ckpt: str, out: Path) -> dict[str, Any]:
    from v3jax.evals.needle import needle, with_yarn
    from v3jax.models import open_model
    from v3jax.report import needle_page
    from v3jax.summary import keep_needles

    loaded = open_model(ckpt, ema=_EMA.value)
    if _YARN.value is not None:
        loaded = with_yarn(loaded, _yarn_factor(_YARN.value))
    print(f"{'tokens':>8s} {'score':>6s} {'right':>6s}")
    found = needle(
        loaded,
        longest=_MAX_LENGTH.value,
        n_needles=_NEEDLES.value,
        chat=_CHAT.value,
        progress=lambda n, score, right: print(f"{n:8d} {score:6.2f} {right:6.1%}", flush=True),
    )
    print(f"needles found: {found.exact:.1%} of {np.size(found.exact_DL) * found.needles}")
    (out / "needle.html").write_text(needle_page(ckpt, found), encoding="utf-8")
    print(f"scores by depth and length: {out / 'needle.html'}")
    # A run's page shows the model as it is, not what else was tried with it.
    as_it_is = _YARN.value is None and _MAX_LENGTH.value is None and not _EMA.value
    if as_it_is and keep_needles(epath.Path(ckpt), found):
        print(f"and in {epath.Path(ckpt) / 'report.html'}")
    return vars(found)


def _instructions(ckpt: str, out: Path) -> dict[str, float]:
    from v3jax.data.instructions import problems
    from v3jax.evals.problems import answers, by_kind, pass_rate
    from v3jax.models import open_model

    loaded = open_model(ckpt, ema=_EMA.value)
    n, room = _LIMIT.value or _INSTRUCTIONS, _MAX_NEW.value or 64
    forms = answers(loaded, problems("forms", "held_out", n), max_tokens=room)
    chains = answers(loaded, problems("chains", "held_out", n), max_tokens=room)
    _write_lines(out / "instructions.jsonl", [asdict(answer) for answer in forms + chains])
    print(f"{'instruction':12s} {'asked':>6s} {'right':>7s}")
    found = by_kind(forms) | {"all forms": forms, "chains": chains}
    for kind, some in found.items():
        print(f"{kind:12s} {len(some):6d} {pass_rate(some):7.1%}")
    print(f"answers: {out / 'instructions.jsonl'}")
    return {kind: pass_rate(some) for kind, some in found.items()}


def _yarn_factor(text: str) -> float | None:
    """The factor of --yarn; None for `off`."""
    try:
        return None if text == "off" else float(text)
    except ValueError:
        raise ValueError(f"--yarn={text}: neither off nor a factor; the report's is 40") from None


def _harness(ckpt: str, tasks: dict[str, Any], out: Path) -> dict[str, Any]:
    from v3jax.evals.harness import Answers, Model, run
    from v3jax.models import identity, open_model

    loaded = open_model(ckpt, ema=_EMA.value)
    length = _MAX_LENGTH.value or loaded.context
    if length > loaded.context:
        raise ValueError(
            f"--max-length={length}: the model was made for {loaded.context} tokens; train it on "
            "longer ones or lower it"
        )
    answers = Answers(out / "answers.jsonl", identity(ckpt, ema=_EMA.value))
    model = Model(
        loaded,
        answers,
        max_length=length,
        truncate=_TRUNCATE.value,
        chat=_CHAT.value,
        max_new_tokens=_MAX_NEW.value,
    )
    for name in catalogue.unlike_report(tasks, chat=_CHAT.value):
        print(f"note: {name} runs {'with' if _CHAT.value else 'without'} --chat, unlike the report")
    found, samples = run(model, tasks, limit=_LIMIT.value, chat=_CHAT.value)
    _write_lines(out / "samples.jsonl", samples)
    for name in catalogue.unexecuted(tasks):
        texts = [(s["doc"], s["resps"][0][0]) for s in samples if s["task"] == name]
        completions = [{"task_id": d.get("task_id"), "completion": text} for d, text in texts]
        _write_lines(out / f"{name}.completions.jsonl", completions)
    print(catalogue.table(tasks, found))
    return found


def _write_lines(file: Path, entries: Sequence[Any]) -> None:
    text = "".join(json.dumps(entry, default=str) + "\n" for entry in entries)
    file.write_text(text, encoding="utf-8")


def listing(folder: Path) -> str:
    """All tasks, one a line, with whether their data is in `folder`."""
    lines = [f"{name:22s} {text}" for name, text in _BUILT_IN.items()]
    return "\n".join([*lines, *catalogue.listing(folder)])


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the harness' libraries read it
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "" if sys.stderr.isatty() else "1")
    cli.run("evaluate", main)
