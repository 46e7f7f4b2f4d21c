"""The harness's view of a model: the scores of its own `hf` class, chance, resuming, refusals."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra eval: lm-eval")
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from v3jax.decode import Engine
from v3jax.evals import harness
from v3jax.evals.harness import Answers, Model
from v3jax.evals.scoring import Scorer
from v3jax.models import Loaded, open_model

ORACLE = Path(__file__).parent / "oracle"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A random checkpoint as Hugging Face's transformers wrote it."""
    found = open_model(ORACLE)
    return replace(found, numerics=replace(found.numerics, compute="fp32"))


def model(loaded: Loaded, answers: Answers | None = None, **options: Any) -> Model:
    given: dict[str, Any] = {"max_length": 48} | options
    return Model(loaded, answers or Answers(None, ""), **given)


def asked(kind: Any, *requests: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, request, i) for i, request in enumerate(requests)]


def test_scores_are_those_of_the_harness_own_class(loaded: Loaded) -> None:
    oracle = json.loads((ORACLE / "answers.json").read_text(encoding="utf-8"))
    ours = model(loaded, max_length=oracle["max_length"], truncate=True)
    pairs = [tuple(pair) for pair in oracle["pairs"]]
    got = ours.loglikelihood(asked("loglikelihood", *pairs))
    assert [score[0] for score in got] == pytest.approx([s[0] for s in oracle["scores"]], rel=1e-6)
    assert [score[1] for score in got] == [s[1] for s in oracle["scores"]]
    documents = [(document,) for document in oracle["documents"]]
    rolled = ours.loglikelihood_rolling(asked("loglikelihood_rolling", *documents))
    assert rolled == pytest.approx(oracle["rolling"], rel=1e-6)


@pytest.mark.parametrize("n_options", [2, 4])
def test_a_random_model_chooses_at_chance(loaded: Loaded, n_options: int, tmp_path: Path) -> None:
    records = [
        {
            "text": f"{n * n} or {n + 7}",
            "options": [f"{'abcd'[(n + i) % 4]}{i}" for i in range(n_options)],
            "answer": (7 * n + n // 3) % n_options,  # an order that says nothing
        }
        for n in range(400)
    ]
    data = tmp_path / "random.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": "random",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "options",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "random.yaml").write_text(json.dumps(task))  # JSON is YAML
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False).load(["random"])
    found, samples = harness.run(model(loaded), tasks)
    assert len(samples) == 400
    result = found["results"]["random"]
    assert result["acc_stderr,none"] == pytest.approx(
        (1 / n_options * (1 - 1 / n_options) / 400) ** 0.5, rel=0.1
    )
    assert abs(result["acc,none"] - 1 / n_options) < 1.96 * result["acc_stderr,none"]


def test_texts_are_the_engines_up_to_the_first_stop(loaded: Loaded) -> None:
    options = {"until": ["zz"], "max_gen_toks": 8, "do_sample": False}
    ours = model(loaded)
    prompts = ["x = 1", "a much longer beginning of", ""]
    got = ours.generate_until(asked("generate_until", *((p, options) for p in prompts)))
    engine = Engine(
        loaded.model,
        loaded.params,
        loaded.router_state,
        loaded.tokenizer,
        numerics=loaded.numerics,
    )
    for prompt, text in zip(prompts, got, strict=True):
        ids = loaded.tokenizer.encode(prompt) or [loaded.tokenizer.bos]
        (one,), _ = engine.generate([ids], max_tokens=8)
        assert text == loaded.tokenizer.decode(one.ids)
    stop = got[0][1:3]
    options = {**options, "until": ["never", stop]}
    (cut,) = ours.generate_until(asked("generate_until", (prompts[0], options)))
    assert cut == got[0].split(stop)[0]


def test_repeats_are_other_samples_and_repeatable(loaded: Loaded) -> None:
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", *[("x = 1", options)] * 4)
    got = model(loaded).generate_until(requests)
    assert len(set(got)) > 1
    assert model(loaded).generate_until(requests) == got


def test_an_interrupted_evaluation_goes_on_where_it_was(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "answers.jsonl"
    requests = asked("loglikelihood", *((f"{n} " * (n % 9 + 1), f" {n}") for n in range(20)))
    whole = model(loaded).loglikelihood(requests)
    monkeypatch.setattr("v3jax.evals.scoring._LENGTHS", (64,))  # a row a batch
    score = Scorer.score

    def dies(self: Scorer, pairs: Sequence[Any], *, max_length: int) -> Iterator[Any]:
        for n, item in enumerate(score(self, pairs, max_length=max_length)):
            if n == 10:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(Scorer, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        model(loaded, Answers(file, "m")).loglikelihood(requests)
    assert len(file.read_text().splitlines()) == 10
    file.write_text(file.read_text() + '{"key": "cut o')  # the process died while it wrote

    counts = []

    def counted(self: Scorer, pairs: Sequence[Any], *, max_length: int) -> Iterator[Any]:
        counts.append(len(pairs))
        return score(self, pairs, max_length=max_length)

    monkeypatch.setattr(Scorer, "score", counted)
    resumed = model(loaded, Answers(file, "m")).loglikelihood(requests)
    assert counts == [10]
    assert [r[0] for r in resumed] == pytest.approx([w[0] for w in whole], rel=1e-6)
    # Another model's answers are not taken, nor those of another length.
    model(loaded, Answers(file, "other")).loglikelihood(requests)
    model(loaded, Answers(file, "m"), max_length=40).loglikelihood(requests)
    assert counts == [10, 20, 20]
    model(loaded, Answers(file, "m")).loglikelihood(requests)
    assert counts[3:] == [0]


def test_what_exceeds_the_context_is_refused_or_cut(loaded: Loaded) -> None:
    long = asked("loglikelihood", ("many words " * 40, " end"))
    with pytest.raises(ValueError, match=r"exceeds the model's context of 48; --truncate"):
        model(loaded).loglikelihood(long)
    assert model(loaded, truncate=True).loglikelihood(long)[0][0] < 0
    text = asked("generate_until", ("many words " * 40, {"max_gen_toks": 4}))
    with pytest.raises(ValueError, match=r"exceeds the model's context"):
        model(loaded).generate_until(text)
    assert isinstance(model(loaded, truncate=True).generate_until(text)[0], str)
    with pytest.raises(ValueError, match="max_gen_toks=48 leaves no room"):
        model(loaded, truncate=True).generate_until(
            asked("generate_until", ("a", {"max_gen_toks": 48}))
        )


def test_a_chat_is_the_templates(loaded: Loaded) -> None:
    ours = model(loaded, chat=True)
    text = ours.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text.endswith("<｜User｜>Hello<｜Assistant｜>")
    ids = ours.tok_encode(text)
    assert ids[0] == loaded.tokenizer.bos  # control tokens count
    assert loaded.tokenizer.control_ids["<｜User｜>"] in ids
    assert harness.Model.chat_template(ours) == loaded.chat_template
