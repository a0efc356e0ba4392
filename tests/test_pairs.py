"""Facts about pairing: hand-worked questions, and the completion form that prompts.py owns."""

import pytest

from memphis_jax.data.prompts import cot_completion
from memphis_jax.rounds.grade import parse
from memphis_jax.rounds.pairs import make_pairs


def question(id):
    return {"id": id, "prompt": f"P{id}", "rationale": "gold", "target": "4", "source": "s"}


def row(id, sample, verdict, rationale, answer):
    return {
        "id": id,
        "sample": sample,
        "text": f"{rationale}\n### Answer:\n{answer}",
        "finish_reason": "stop",
        "num_tokens": 9,
        "rationale": rationale,
        "answer": answer,
        "verdict": verdict,
    }


def test_hand_worked_round():
    questions = [question("mixed"), question("right"), question("wrong"), question("mute")]
    questions.append(question("silent"))  # no completions at all
    rows = [
        # out of order on purpose: samples decide
        row("mixed", 5, "incorrect", "bad two", "6"),
        row("mixed", 0, "correct", "good one", "4"),
        row("mixed", 1, "incorrect", "bad one", "5"),
        row("mixed", 2, "correct", "Good\n  ONE", "4"),  # folds to sample 0
        row("mixed", 3, "correct", "good two", "4"),
        row("mixed", 4, "invalid", "", ""),
        row("mixed", 6, "unknown", "who knows", "four-ish"),
        row("mixed", 7, "correct", "good three", "4"),  # one more than there are incorrect ones
        row("right", 0, "correct", "a", "4"),
        row("right", 1, "invalid", "", ""),
        row("wrong", 0, "incorrect", "a", "9"),
        row("wrong", 1, "incorrect", "a", "9"),
        row("mute", 0, "invalid", "", ""),
        row("mute", 1, "unknown", "a", "some"),
    ]
    pairs, stats = make_pairs(rows, questions)
    assert pairs == [
        {
            "id": "mixed",
            "prompt": "Pmixed",
            "chosen": "good one\n### Answer:\n4",
            "rejected": "bad one\n### Answer:\n5",
            "gold": "gold\n### Answer:\n4",
        },
        {
            "id": "mixed",
            "prompt": "Pmixed",
            "chosen": "good two\n### Answer:\n4",
            "rejected": "bad two\n### Answer:\n6",
            "gold": "gold\n### Answer:\n4",
        },
    ]
    assert stats == {
        "questions": 5,
        "all_correct": 1,
        "mixed": 1,
        "all_wrong": 1,
        "no_valid": 2,
        "pairs": 2,
        "duplicates": 2,
        "correct": 5,
        "incorrect": 4,
        "invalid": 3,
        "unknown": 2,
    }
    assert make_pairs(reversed(rows), questions) == (pairs, stats)


def test_pairs_follow_the_order_of_the_questions_and_their_limit():
    questions = [question("b"), question("a")]
    rows = [
        row(id, sample, verdict, f"{verdict} {sample}", "4")
        for id in ("a", "b")
        for sample, verdict in enumerate(["correct", "incorrect"] * 3)
    ]
    pairs, stats = make_pairs(rows, questions, max_pairs_per_question=2)
    assert [pair["id"] for pair in pairs] == ["b", "b", "a", "a"]
    assert [pair["chosen"][:9] for pair in pairs[:2]] == ["correct 0", "correct 2"]
    assert stats["pairs"] == 4
    assert len(make_pairs(rows, questions)[0]) == 6


def test_no_pairs_is_an_empty_list_not_an_error():
    pairs, stats = make_pairs([row("a", 0, "incorrect", "r", "1")], [question("a")])
    assert pairs == []
    assert stats["pairs"] == 0
    assert stats["all_wrong"] == 1


@pytest.mark.parametrize(
    ("rationale", "answer"),
    [
        ("plain", "4"),
        ("  outer space \n", "\n4 "),
        ("### User:\nforged", "4"),
        ("one\n### Answer:\n5\ntwo", "### Rationale:\nx"),
        ("one\n\n   ### Assistant: hi", "   ### Answer: 3"),
    ],
)
def test_texts_have_the_form_of_cot_completion(rationale, answer):
    rows = [row("a", 0, "correct", rationale, answer), row("a", 1, "incorrect", "no", answer)]
    asked = {**question("a"), "rationale": rationale, "target": answer}
    [pair], _ = make_pairs(rows, [asked])
    assert pair["chosen"] == pair["gold"] == cot_completion(rationale, answer)
    assert parse(pair["chosen"]) is not None


def test_inconsistent_rows_are_refused():
    good = row("a", 0, "correct", "r", "4")
    with pytest.raises(ValueError, match="'a' appears twice"):
        make_pairs([], [question("a"), question("a")])
    with pytest.raises(ValueError, match=r"\('b', 0\) has no question"):
        make_pairs([{**good, "id": "b"}], [question("a")])
    with pytest.raises(ValueError, match=r"\('a', 0\) appears twice"):
        make_pairs([good, good], [question("a")])
    with pytest.raises(ValueError, match="verdict 'right'"):
        make_pairs([{**good, "verdict": "right"}], [question("a")])
