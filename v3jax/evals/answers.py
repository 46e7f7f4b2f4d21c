"""What generated texts answer, and whether that is right (`process_results` of `tasks/`).

A function takes a record and the harness's results, one text or a list of samples of it, and gives
the metrics of the record; several samples give their mean.
"""

import ast
import math
import re
import string
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Results = Sequence[str | Sequence[str]]
Metrics = dict[str, Any]


# --- Numbers ---


def gsm8k(doc: Record, results: Results) -> Metrics:
    """The number after "The answer is", else the last one, against that after `####`."""
    return _numeric(results, numbers(doc["answer"].rpartition("####")[2])[0], after="the answer is")


def mgsm(doc: Record, results: Results) -> Metrics:
    """The last number, against `answer_number`."""
    return _numeric(results, float(doc["answer_number"]))


def cmath(doc: Record, results: Results) -> Metrics:
    """The quantity after "答案是", else the last one, against `golden` (`3`, `1/3` or `40%`)."""
    (wanted,) = quantities(str(doc["golden"]))

    def right(text: str) -> bool:
        said = quantities(_after(text, "答案是"))[:1] or quantities(text)[-1:]
        return said != [] and math.isclose(said[0], wanted)

    return _match(results, right)


def numbers(text: str) -> list[float]:
    """The numbers of a text in its order; commas group thousands, a dash after a digit is none."""
    found = re.findall(r"(?:(?<![\w)\]])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", text)
    return [float(number.replace(",", "")) for number in found]


def quantities(text: str) -> list[float]:
    """Numbers, with fractions of two of them and percentages computed."""
    found = re.findall(r"((?<!\d)-)?(\d+(?:\.\d+)?)(?:/(\d+))?\s*(%)?", text.replace(",", ""))
    return [
        float(minus + above) / (int(below or 1) or math.inf) / (100 if percent else 1)
        for minus, above, below, percent in found
    ]


def _numeric(results: Results, wanted: float, after: str | None = None) -> Metrics:
    def right(text: str) -> bool:
        said = numbers(_after(text, after))[:1] if after is not None else []
        said = said or numbers(text)[-1:]
        return said != [] and math.isclose(said[0], wanted)

    return _match(results, right)


# --- Mathematics ---


def math_final(doc: Record, results: Results) -> Metrics:
    """MATH's "The final answer is", else the last `\\boxed`, against that of `solution`."""
    wanted = boxed(doc["solution"]) or ""

    def right(text: str) -> bool:
        said = re.search(r"final answer is:?\s*(.+?)\.?\s*(?:I hope it is|$)", text, re.S | re.I)
        return same_math(said[1] if said else boxed(text) or "", wanted)

    return _match(results, right)


def math_boxed(doc: Record, results: Results) -> Metrics:
    """The last `\\boxed`, against `answer`."""
    return _match(results, lambda text: same_math(boxed(text) or "", str(doc["answer"])))


def boxed(text: str) -> str | None:
    """What the last `\\boxed` (or `\\fbox`) holds, with its inner braces; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box" if text.startswith("\\fbox", start) else "boxed")[2]
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest.strip(), maxsplit=1)[0] or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None


def same_math(text: str, wanted: str) -> bool:
    """Whether two answers are the same text after `plain_math`, or the same number."""
    one, other = plain_math(text), plain_math(wanted)
    if one == other:
        return one != ""
    values = [value for value in map(_value, (one, other)) if value is not None]
    return len(values) == 2 and math.isclose(*values)


def plain_math(text: str) -> str:
    """TeX without what leaves its meaning alone: spacing, sizes, units, signs of money, "x =".

    In the manner of MATH's own comparison: fractions and roots get their braces, decimals their
    leading zero. Expressions are not computed.
    """
    text = text.strip().rstrip(".。").replace("{,}", ",")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,;: ]|\\?\$|\\?%", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])", "", text)
    text = re.sub(r"(?<=.)\\(?:text|mbox|mathrm|textrm)\{\s[^{}]*\}(?:\^\{?\d\}?)?\s*$", "", text)
    text = re.sub(r"\\(?:text|mbox|mathrm|mathbf|textbf|textrm)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s", "", text).rstrip(".。")
    text = re.sub(r"^[A-Za-z]{1,2}(?:=|\\in(?![A-Za-z]))", "", text)
    text = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac(\d)(\{)", r"\\frac{\1}\2", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(?<![\d.])\.(\d)", r"0.\1", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    return text


def _value(text: str) -> float | None:
    if fraction := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(\d+)\}", text):
        sign, above, below = fraction.groups()
        return float(sign + "1") * int(above) / int(below) if int(below) else None
    return float(text) if re.fullmatch(r"-?\d+(?:\.\d+)?", text) else None


# --- Letters ---


def letter_line(doc: Record, results: Results) -> Metrics:
    """The letter of the last "Answer: X", against `answer` (a letter or its index) or `letter`."""
    wanted = doc.get("letter", doc.get("answer"))
    wanted = wanted if isinstance(wanted, str) else "ABCD"[int(wanted or 0)]

    def right(text: str) -> bool:
        found = re.match("[A-Za-z](?![A-Za-z])", answer_line(text))
        return found is not None and found[0].upper() == wanted

    return _match(results, right)


def answer_line(text: str) -> str:
    """What follows the last "Answer:" on its line, without emphasis and TeX; empty without one."""
    found = re.findall(r"(?i)answer\W{0,4}?[:\uff1a]([^\n]*)", text)
    line = re.sub(r"\\(?:boxed|text|textbf|mathbf)|[*$\\{}()]", "", found[-1]) if found else ""
    return line.strip()


def json_letter(doc: Record, results: Results) -> Metrics:
    """ZeroEval's `"answer": "X"`, against the index `answer`."""
    wanted = "ABCD"[doc["answer"]]

    def right(text: str) -> bool:
        found = re.search(r'"answer"\s*:\s*"?\(?([A-Z])\b', text)
        found = found or re.search(r"answer\s*:\s*\(?([A-Z])\b", text)
        return found is not None and found[1] == wanted

    return _match(results, right)


def mmlu_pro(doc: Record, results: Results) -> Metrics:
    """The letter after "answer is", else after "answer:", else the last one, against `answer`."""

    def right(text: str) -> bool:
        found = (
            re.search(r"answer is \(?([A-J])\b", text)
            or re.search(r"(?s:.*)[aA]nswer:\s*\(?([A-J])\b", text)
            or re.search(r"(?s:.*)\b([A-J])\b", text)
        )
        return found is not None and found[1] == doc["answer"]

    return _match(results, right)


def longbench(doc: Record, results: Results) -> Metrics:
    """The letter of "The correct answer is (X)", against `answer`."""

    def right(text: str) -> bool:
        found = re.search(r"The correct answer is:?\s*\(?([A-D])\b", text.replace("*", ""))
        return found is not None and found[1] == doc["answer"]

    return _match(results, right)


def ceval(doc: Record, results: Results) -> Metrics:
    """The letter after the last "答案", else the last one, against `answer`."""

    def right(text: str) -> bool:
        found = re.findall(r"答案[^A-D\n]{0,12}([A-D])(?![A-Za-z])", text)
        found = found or re.findall(r"(?<![A-Za-z])[A-D](?![A-Za-z])", text)
        return bool(found) and found[-1] == doc["answer"]

    return _match(results, right)


def agieval(doc: Record, results: Results) -> Metrics:
    """AGIEval by subject: the letters that a text names first, or its mathematical answer."""

    def right(text: str) -> bool:
        line = text.strip().split("\n")[0]
        if not doc["options"]:
            return _cloze(line, str(doc["answer"]).split(";"))
        wanted = set(re.findall("[A-G]", "".join(doc["label"])))
        said = re.findall("[A-G]", line)
        several = isinstance(doc["label"], list) or len(wanted) > 1
        return bool(said) and set(said if several else said[:1]) == wanted

    return _of_subject(doc, _match(results, right))


def _cloze(line: str, wanted: Sequence[str]) -> bool:
    """Whether the boxed answer, else the last formulas, else the whole line are the blanks'."""
    answer = boxed(line)
    said = re.findall(r"\$([^$]+)\$", line)[-len(wanted) :] if answer is None else [answer]
    if len(said) < len(wanted):
        said = re.split("[;\uff1b]", answer or line)
    return len(said) == len(wanted) and all(map(same_math, said, wanted))


# --- Short texts ---


def bbh(doc: Record, results: Results) -> Metrics:
    """BBH by subject: what follows "the answer is", against `target`."""
    wanted = doc["target"].strip()

    def right(text: str) -> bool:
        said = _after(text, "the answer is").strip().split("\n")[0]
        return said.rstrip(" .") == wanted

    return _of_subject(doc, _match(results, right))


def trivia(doc: Record, results: Results) -> Metrics:
    """The first line, against `value` or any alias of TriviaQA's `answer`."""
    answer = doc["answer"]
    return _match(results, _one_of([answer["value"], *answer["aliases"]]))


def natural_questions(doc: Record, results: Results) -> Metrics:
    """The first line, against any `answer`."""
    return _match(results, _one_of(doc["answer"]))


def plain_words(text: str) -> str:
    """Lower case, without punctuation, articles and double spaces (SQuAD's comparison)."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def _one_of(answers: Iterable[str]) -> Callable[[str], bool]:
    wanted = {plain_words(answer) for answer in answers} - {""}
    return lambda text: plain_words(text.strip().split("\n")[0]) in wanted


def drop(doc: Record, results: Results) -> Metrics:
    """DROP's F1 and exact match of the first line, the best over the given answers."""
    return _drop(doc, results, lambda text: text.strip().split("\n")[0])


def drop_line(doc: Record, results: Results) -> Metrics:
    """The same of what follows the last "Answer:", or of the text without one."""
    return _drop(doc, results, lambda text: answer_line(text) or text)


def _drop(doc: Record, results: Results, said: Callable[[str], str]) -> Metrics:
    """By the harness's copy of DROP's script; a text is several spans where an answer is."""
    from lm_eval.tasks.drop.utils import get_answers, get_metrics

    golds = [gold for gold in get_answers(doc) if gold[0].strip()]
    scores = []
    for text in _texts(results):
        answer = said(text).strip().rstrip(".")
        spans = answer.split(", ") if any(len(gold) > 1 for gold in golds) else [answer]
        pairs = [get_metrics(answer if len(gold) == 1 else spans, gold) for gold in golds]
        scores.append([max(of) for of in zip(*pairs, strict=True)] if pairs else [0.0, 0.0])
    matches, f1 = zip(*scores, strict=True)
    return {"exact_match": _mean(matches), "f1": _mean(f1)}


def cmrc(doc: Record, results: Results) -> Metrics:
    """The first line, against any of `answers`, punctuation and spaces aside."""
    wanted = {_bare(text) for text in doc["answers"]["text"]}
    return _match(results, lambda text: _bare(text.strip().split("\n")[0]) in wanted)


def cluewsc(doc: Record, results: Results) -> Metrics:
    """Whether the named noun is `span1` exactly where the label says so; see `_is_true`."""
    span = _bare(doc["target"]["span1_text"])

    def right(text: str) -> bool:
        said = _bare(text.strip().split("\n")[0])
        return (said != "" and (said in span or span in said)) == _is_true(doc["label"])

    return _match(results, right)


def cluewsc_yes(doc: Record, results: Results) -> Metrics:
    """The last "是" or "否" after "答案", else the last one, against the label."""

    def right(text: str) -> bool:
        said = re.findall(r"答案[^\w\n]*(是|否)", text) or re.findall(r"不是|是|否", text)
        return bool(said) and (said[-1] == "是") == _is_true(doc["label"])

    return _match(results, right)


def cruxeval_output(doc: Record, results: Results) -> Metrics:
    """The literal of the completed assertion, against the value of `output`."""

    def right(text: str) -> bool:
        text = text.split("[/ANSWER]")[0].strip()
        start = f"assert f({doc['input']}) =="
        literal = text[len(start) :] if text.startswith(start) else text.rpartition("==")[2]
        literal, wanted = literal.strip().split("\n")[0], doc["output"].strip()
        try:
            return bool(ast.literal_eval(literal) == ast.literal_eval(wanted))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return literal == wanted

    return _match(results, right)


def ifeval(doc: Record, results: Results) -> Metrics:
    """Whether all instructions of a prompt are followed, by the harness's copy of the checks.

    Raises:
      ValueError: NLTK's sentence splitter is not installed.
    """
    from lm_eval.tasks.ifeval.utils import process_results

    name = "prompt_level_strict_acc"
    try:
        return {name: _mean(process_results(doc, [text])[name] for text in _texts(results))}
    except LookupError as error:
        raise ValueError("ifeval: no punkt_tab; python -m nltk.downloader punkt_tab") from error


# --- What they share ---


def mean_of_subjects(scores: Sequence[tuple[str, float]]) -> float:
    """The mean of the subjects' means, of `(subject, score)` pairs (an `aggregation`)."""
    groups: dict[str, list[float]] = {}
    for subject, score in scores:
        groups.setdefault(subject, []).append(score)
    return _mean(_mean(group) for group in groups.values())


def _of_subject(doc: Record, metrics: Metrics) -> Metrics:
    return {name: (doc["subject"], value) for name, value in metrics.items()}


def _match(results: Results, right: Callable[[str], bool]) -> Metrics:
    return {"exact_match": _mean(right(text) for text in _texts(results))}


def _texts(results: Results) -> list[str]:
    """The samples of the one request that a record makes."""
    (texts,) = results
    return [texts] if isinstance(texts, str) else list(texts)


def _mean(values: Iterable[float]) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)


def _after(text: str, marker: str) -> str:
    """What follows the last `marker`, in any case; nothing without one."""
    parts = re.split(re.escape(marker), text, flags=re.IGNORECASE)
    return parts[-1] if len(parts) > 1 else ""


def _bare(text: str) -> str:
    """Lower case, without punctuation, signs and spaces of any script."""
    return "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PSZC")


def _is_true(label: int | str) -> bool:
    """A label of CLUEWSC: `true` is 0 in the Hub's records."""
    return label in (0, "true")
