"""Answers parsed from texts as models write them."""

from typing import Any

import pytest

from v3jax.evals import answers


def match(function: Any, text: str | list[str], **doc: Any) -> float:
    """The exact match of a text, or the mean of several samples."""
    return function(doc, [text])["exact_match"]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so 3 + 4 = 7", [3, 4, 7]),
        ("$1,234.50 and 2,000,000.", [1234.5, 2e6]),
        ("5-3=2, x=-2, (-4)", [5, 3, 2, -2, -4]),
        ("1,2,3 or 12,5", [1, 2, 3, 12, 5]),
        ("18.", [18]),
        ("none", []),
    ],
)
def test_numbers_are_read_with_commas_signs_and_full_stops(text: str, wanted: list[float]) -> None:
    assert answers.numbers(text) == wanted


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (" He pays 3*4=12 dollars. The answer is 1,012.", 1),
        (" The answer is $1012.00. Then 7 more.", 1),
        (" First the answer is 5? No. The answer is 1012", 1),
        (" 1000 + 12 = 1012", 1),
        (" The answer is 12. 1012", 0),
        (" I do not know", 0),
        ("", 0),
    ],
)
def test_gsm8k_takes_the_number_after_the_words_else_the_last_one(text: str, right: int) -> None:
    assert match(answers.gsm8k, text, answer="3*4=<<3*4=12>>12\n#### 1,012") == right


def test_mgsm_takes_the_last_number() -> None:
    assert match(answers.mgsm, " 5+4=9. Die Antwort ist 9.", answer_number=9) == 1
    assert match(answers.mgsm, " 5+4=9. Die Antwort ist 9. 1", answer_number=9.0) == 0


@pytest.mark.parametrize(
    ("golden", "text", "right"),
    [
        ("18", "3*6=18。所以答案是\uff1a18。", 1),
        ("1/5", "所以答案是\uff1a1/5。", 1),
        ("2/4", "答案是0.5", 1),
        ("27.3%", "一共27.3%。", 1),
        ("40%", "答案是\uff1a40。", 0),
        ("18", "18只剩5", 0),
    ],
)
def test_cmath_takes_fractions_and_percentages(golden: str, text: str, right: int) -> None:
    assert match(answers.cmath, text, golden=golden) == right


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"so $\boxed{\frac{1}{\sqrt{2}}}$ and done", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or rather \boxed{\{2, 3\}}.", r"\{2, 3\}"),
        (r"$\fbox{a_{1}}$", "a_{1}"),
        (r"$\boxed 5$.", "5"),
        (r"\boxed{never closed", None),
        ("no box", None),
    ],
)
def test_the_last_box_is_read_with_its_inner_braces(text: str, wanted: str | None) -> None:
    assert answers.boxed(text) == wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{3}{4}", r"\frac34"),
        ("3/4", r"\frac{3}{4}"),
        ("0.75", r"\tfrac{3}{4}"),
        ("-0.5", r"-\frac{1}{2}"),
        (r"\left( 2, 5 \right]", "(2,5]"),
        ("$10{,}000$", "10,000"),
        (r"1,\!000", "1000"),
        (r"5 \text{ cm}^2", "5"),
        (r"\text{Monday}", "Monday"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"x = 7", "7"),
        (r"x \in [1,2)", "[1,2)"),
        (r"50\%", "50"),
        (r"\$3.50", "3.5"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        ("x^{2}+1", "x^2 + 1"),
        (".5", "0.5"),
        ("12.", "12"),
    ],
)
def test_mathematics_that_looks_different_is_the_same(one: str, other: str) -> None:
    assert answers.same_math(one, other)
    assert answers.same_math(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "2"), ("(1,2)", "(1,3)"), ("", ""), (r"\frac{1}{3}", "0.33"), ("1,2", "12"), ("5", "")],
)
def test_other_mathematics_is_not(one: str, other: str) -> None:
    assert not answers.same_math(one, other)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"We get $\boxed{[2,5)}$." "\nFinal Answer: The final answer is $[2,5)$. ", 1),
        ("\nFinal Answer: The final answer is $[2, 5)$. I hope it is correct.", 1),
        (r"Therefore $\boxed{[2,5)}$.", 1),
        (r"$\boxed{[2,5)}$. Final Answer: The final answer is $[2,6)$.", 0),
        ("I think [2,5)", 0),
    ],
)
def test_math_takes_the_final_answer_else_the_last_box(text: str, right: int) -> None:
    solution = r"It is $\boxed{7}$, no, $\boxed{[2,5)}$."
    assert match(answers.math_final, text, solution=solution) == right


def test_samples_give_their_mean() -> None:
    samples = [r"\boxed{33}", r"\boxed{033}", "33", r"so $\boxed{34}$"]
    assert match(answers.math_boxed, samples, answer="33") == 0.5
    assert match(answers.math_boxed, samples[:1], answer=33) == 1


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Thinking.\nAnswer: C", "C"),
        ("Answer: A? No.\n**Answer: C**", "C"),
        ("**Answer:** C", "C"),
        ("The final answer: $\\boxed{\\text{C}}$", "C"),
        ("Answer: (C) because", "C"),
        ("answer: c", "C"),
        ("Answer: Certainly", ""),
        ("It is C.", ""),
    ],
)
def test_the_letter_of_the_last_answer_line(text: str, letter: str) -> None:
    for wanted in "ABCD":
        assert match(answers.letter_line, text, answer="ABCD".index(wanted)) == (wanted == letter)
    assert match(answers.letter_line, text, letter="C") == (letter == "C")


def test_zeroeval_takes_the_letter_of_the_json() -> None:
    text = '```json\n{\n  "reasoning": "The answer: A is not.",\n  "answer": "B"\n}\n```'
    assert match(answers.json_letter, text, answer=1) == 1
    assert match(answers.json_letter, '{"reasoning": "cut off', answer=1) == 0
    assert match(answers.json_letter, '{"reasoning": "", "answer": "B) two"}', answer=1) == 1
    assert match(answers.json_letter, "reasoning: none, answer: B", answer=1) == 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Let A be one. Thus the answer is (J).", 1),
        ("the answer is J", 1),
        ("Answer: J", 1),
        ("Between A and J, J", 1),
        ("The answer is (A). J", 0),
        ("nothing", 0),
    ],
)
def test_mmlu_pro_falls_back_to_the_last_letter(text: str, right: int) -> None:
    assert match(answers.mmlu_pro, text, answer="J") == right


def test_longbench_takes_the_stated_letter_only() -> None:
    assert match(answers.longbench, "**The correct answer is (D)**", answer="D") == 1
    assert match(answers.longbench, "The correct answer is D.", answer="D") == 1
    assert match(answers.longbench, "D", answer="D") == 0


def test_ceval_takes_the_last_stated_letter_else_the_last_one() -> None:
    assert match(answers.ceval, "答案\uff1aA不对。\n答案\uff1aB", answer="B") == 1
    assert match(answers.ceval, "所以正确答案是 **B**。", answer="B") == 1
    assert match(answers.ceval, "A错\uff0c选B。", answer="B") == 1
    assert match(answers.ceval, "BBC", answer="B") == 0


@pytest.mark.parametrize(
    ("doc", "text", "right"),
    [
        ({"options": ["a"], "label": "C"}, " C. Because A is wrong", 1),
        ({"options": ["a"], "label": "C"}, " A", 0),
        ({"options": ["a"], "label": ["A", "C"]}, "A、C", 1),
        ({"options": ["a"], "label": ["A", "C"]}, "A", 0),
        ({"options": ["a"], "label": ["C"]}, "C", 1),
        ({"options": ["a"], "label": "A B D"}, "ABD", 1),
        ({"options": ["a"], "label": []}, "none", 0),
        ({"options": None, "answer": "(3,4]"}, " $(3,4]$.\nNext", 1),
        ({"options": None, "answer": "30"}, " 30.", 1),
        ({"options": None, "answer": "30"}, r" \boxed{30}, as 20 is not", 1),
        ({"options": None, "answer": "30"}, " $x=20$, then $y=30$.", 1),
        ({"options": None, "answer": "$5$;$10$"}, "$5$\uff1b$10$", 1),
        ({"options": None, "answer": "$5$;$10$"}, "5; 10", 1),
        ({"options": None, "answer": r"1;$\frac{8}{9}$"}, r"1; $\frac{8}{9}$", 1),
        ({"options": None, "answer": r"17\text{ meters}"}, r" 17\text{ meters}.", 1),
        ({"options": None, "answer": "$5$;$10$"}, "5", 0),
    ],
)
def test_agieval_reads_letters_and_formulas(doc: dict[str, Any], text: str, right: int) -> None:
    assert match(answers.agieval, text, subject="s", **doc) == ("s", right)


@pytest.mark.parametrize(
    ("target", "text", "right"),
    [
        ("(A)", "It is late. So the answer is (A).", 1),
        ("No", "So the answer is Yes. But then, so the answer is No.\n", 1),
        ("] ) }", "So the answer is ] ) } .", 1),
        ("valid", "the answer is invalid.", 0),
        ("(A)", "(A)", 0),
    ],
)
def test_bbh_takes_what_follows_the_words(target: str, text: str, right: int) -> None:
    assert match(answers.bbh, text, subject="s", target=target) == ("s", right)


def test_subjects_count_alike_whatever_their_size() -> None:
    assert answers.mean_of_subjects([("a", 1.0)] * 3 + [("b", 0.0)] + [("a", 0.0)]) == 0.375


def test_short_answers_match_any_alias_but_for_case_articles_and_punctuation() -> None:
    answer = {"value": "The Beatles", "aliases": ["Beatles (band)", "Fab Four"]}
    assert match(answers.trivia, " beatles.\nQ: next", answer=answer) == 1
    assert match(answers.trivia, " the Fab-Four", answer=answer) == 0
    assert match(answers.trivia, " Fab Four!", answer=answer) == 1
    assert match(answers.trivia, "", answer=answer) == 0
    assert match(answers.natural_questions, " 14 December, 1972", answer=["14 December 1972"]) == 1


def drop(given: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    full = [
        {"number": "", "spans": [], "date": dict.fromkeys(("day", "month", "year"), "")} | answer
        for answer in (given, *others)
    ]
    names = ("number", "spans", "date")
    return {
        "answer": full[0],
        "validated_answers": {name: [answer[name] for answer in full[1:]] for name in names},
    }


@pytest.mark.parametrize(
    ("doc", "text", "em", "f1"),
    [
        (drop({"number": "83.9"}), " 83.9.", 1, 1),
        (drop({"number": "7"}), " 7 yards.", 0, 0.67),
        (drop({"number": "7"}), " 8 yards.", 0, 0),
        (drop({"spans": ["the Baltimore Ravens"]}), " Ravens.", 0, 0.67),
        (
            drop({"spans": ["Ravens"]}, {"spans": ["the Baltimore Ravens"]}),
            " Baltimore ravens",
            1,
            1,
        ),
        (drop({"spans": ["Ann", "Bo Li"]}), " Bo Li, Ann.", 1, 1),
        (drop({"spans": ["Ann", "Bo Li"]}), " Ann.", 0, 0.5),
        (drop({"date": {"day": "", "month": "May", "year": "1999"}}), " May 1999.", 1, 1),
        (drop({"number": "7"}), "", 0, 0),
    ],
)
def test_drop_scores_bags_of_words_over_all_given_answers(
    doc: dict[str, Any], text: str, em: float, f1: float
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval (extra [eval]) is not installed")
    assert answers.drop(doc, [text]) == {"exact_match": em, "f1": pytest.approx(f1, abs=0.006)}
    said = f"Passage says so.\n**Answer:** {text.strip()}"
    assert text == "" or answers.drop_line(doc, [said])["f1"] == pytest.approx(f1, abs=0.006)


def test_cmrc_compares_without_punctuation_and_spaces() -> None:
    given = {"text": ["欧根亲王和卡尔大公", "欧根亲王\u3001卡尔大公"]}
    assert match(answers.cmrc, "欧根亲王, 卡尔大公。\n问题", answers=given) == 1
    assert match(answers.cmrc, "卡尔大公", answers=given) == 0


@pytest.mark.parametrize(
    ("text", "names_it"),
    [("小王\n", True), ("那个小王。", True), ("王", True), ("李", False), ("", False)],
)
def test_cluewsc_is_right_where_the_noun_agrees_with_the_label(text: str, names_it: bool) -> None:
    target = {"span1_text": "小王", "span2_text": "他"}
    for label, true in ((0, True), (1, False), ("true", True), ("false", False)):
        assert match(answers.cluewsc, text, label=label, target=target) == (names_it == true)


def test_cluewsc_of_a_chat_takes_the_last_yes_or_no() -> None:
    assert match(answers.cluewsc_yes, "可能不是。\n答案\uff1a是", label=0) == 1
    assert match(answers.cluewsc_yes, "**答案\uff1a“否”**", label=1) == 1
    assert match(answers.cluewsc_yes, "这里不是。", label=1) == 1
    assert match(answers.cluewsc_yes, "嗯", label=1) == 0


@pytest.mark.parametrize(
    ("output", "text", "right"),
    [
        ("[(4, 1), (4, 1)]", "assert f([1, '==']) == [(4,1), (4,1)]\n", 1),
        ("'a == b'", "assert f([1, '==']) == 'a == b'", 1),
        ("{'a': 1}", 'assert f(x) == {"a": 1}\n[/ANSWER]\n[PYTHON]', 1),
        ("'1'", "assert f([1, '==']) == 1", 0),
        ("[1]", "[1]", 1),
        ("[1]", "assert f([1, '==']) == [1", 0),
        ("Counter({1: 2})", "assert f([1, '==']) == Counter({1: 2})", 1),
    ],
)
def test_cruxeval_compares_values_not_texts(output: str, text: str, right: int) -> None:
    assert match(answers.cruxeval_output, text, input="[1, '==']", output=output) == right
