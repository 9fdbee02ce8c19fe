"""`disco_trl.evaluation.benchmarks`: rows as they are published, and scores by hand."""

import math

import numpy as np
import pytest

from disco_trl.data.values import BadRow
from disco_trl.evaluation.benchmarks import BENCHMARKS, Item, read_preference
from disco_trl.evaluation.held_out import HeldOut


REWARD_BENCH = {
    **{"id": 7, "prompt": "2 + 2?", "chosen": "4", "rejected": "5", "subset": "math-prm"},
    **{"chosen_model": "human", "rejected_model": "unknown"},
}
REWARD_BENCH_2 = {
    **{"id": "12", "prompt": "Capital of France?", "chosen": ["Paris"], "rejected": ["Rome", "Nice", "Lyon"]},
    **{"subset": "Factuality", "num_correct": 1, "num_incorrect": 3, "total_completions": 4},
}
RM_BENCH = {
    **{"id": "chat/1", "prompt": "Hi", "chosen": ["a", "bb", "ccc"], "rejected": ["x", "yy", "zzz"]},
    "domain": "chat",
}
JUDGE_BENCH = {
    **{"pair_id": "p", "source": "mmlu-pro-law", "question": "Why?", "response_A": "So.", "response_B": "No."},
    "label": "B>A",
}
LLM_BAR = {"input": "Say yes.", "output_1": "yes", "output_2": "no", "label": 1}
ROWS = {
    "reward-bench": REWARD_BENCH,
    "reward-bench-2": REWARD_BENCH_2,
    "rm-bench": RM_BENCH,
    "judge-bench": JUDGE_BENCH,
    "llm-bar": LLM_BAR,
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_recognises_its_rows_and_no_others(name):
    assert [other for other, row in ROWS.items() if BENCHMARKS[name].recognise(row)] == [name]
    assert not BENCHMARKS[name].recognise({"prompt": "a", "chosen": "b", "rejected": "c"})


@pytest.mark.parametrize(
    ("name", "change", "column"),
    [
        ("reward-bench", {"chosen": None}, "chosen"),
        ("reward-bench-2", {"rejected": []}, "rejected"),
        ("rm-bench", {"chosen": ["a", "b"]}, "chosen"),
        ("judge-bench", {"label": "A"}, "label"),
        ("llm-bar", {"label": 3}, "label"),
    ],
)
def test_a_bad_row_names_its_column(name, change, column):
    with pytest.raises(BadRow) as caught:
        BENCHMARKS[name].read(ROWS[name] | change)
    assert caught.value.problem.column == column


def read(name: str, *changes: dict) -> list:
    return [BENCHMARKS[name].read(ROWS[name] | change) for change in changes]


def said_in(item: Item) -> list[tuple[int, int, float, float]]:
    return [(said.first, said.second, said.target, said.people) for said in item.comparisons]


def score(name: str, items: list, rewards: list, weight=None) -> dict[str, float]:
    arrays = [np.array(of_item, dtype=float) for of_item in rewards]
    return BENCHMARKS[name].summarize(items, arrays, np.ones(len(items)) if weight is None else np.array(weight))


def test_an_answer_is_a_turn_after_its_prompt():
    (item,) = read("reward-bench", {})
    assert item.contents[0] == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    assert said_in(item) == [(0, 1, 1, 1)]


def test_reward_bench_weighs_math_as_much_as_code():
    subsets = ["math-prm", "math-prm", "hep-python", "hep-rust", "alpacaeval-easy"]
    items = read("reward-bench", *({"subset": subset} for subset in subsets))
    found = score("reward-bench", items, [(1, 0), (0, 1), (1, 0), (1, 1), (2, 1)])
    # Equal rewards are not a win. Math 1/2, Python 1, Rust 0.
    assert found["Reasoning"] == pytest.approx((984 * 0.5 + 164 * 1 + 164 * 0) / (984 + 2 * 164))
    assert found["Chat"] == 1
    assert found["score"] == pytest.approx((found["Reasoning"] + 1) / 2)


def test_reward_bench_weighs_xstest_as_it_does_since_september_2024():
    subsets = ["xstest-should-refuse", "xstest-should-respond", "donotanswer", "refusals-dangerous"]
    items = read("reward-bench", *({"subset": subset} for subset in [*subsets, subsets[0]]))
    # should-refuse 1/2, should-respond 1, donotanswer 0, refusals 1
    found = score("reward-bench", items, [(1, 0), (1, 0), (0, 1), (1, 0), (0, 1)])
    assert found["Safety"] == pytest.approx((154 * 0.5 + 250 * 1 + 136 * 0 + 100 * 1) / (154 + 250 + 136 + 100))
    assert found["score"] == found["Safety"]


def test_reward_bench_2_credits_the_best_of_four():
    items = read("reward-bench-2", {}, {}, {}, {"subset": "Math"})
    found = score("reward-bench-2", items, [(3, 1, 2, 0), (3, 3, 1, 0), (0, 1, 2, 3), (1, 0, 0, 0)])
    assert found == pytest.approx({"Factuality": (1 + 1 / 2 + 0) / 3, "Math": 1, "score": (0.5 + 1) / 2})


def test_reward_bench_2_credits_the_first_answer_alone():
    # Outside of Ties its code compares the rewards with the first one, however many answers are called right.
    items = read("reward-bench-2", *[{"chosen": ["red", "blue"], "rejected": ["six", "seven"]}] * 3)
    found = score("reward-bench-2", items, [(2, 3, 1, 0), (3, 3, 1, 0), (3, 2, 1, 3)])
    assert found["Factuality"] == pytest.approx((0 + 1 / 2 + 1 / 2) / 3)


def test_reward_bench_2_ties():
    tied = {"subset": "Ties", "chosen": ["red", "blue"], "rejected": ["seven"], "num_correct": 2}
    reference = {"subset": "Ties", "chosen": ["Paris"], "rejected": ["Rome"]}
    items = read(
        "reward-bench-2",
        tied | {"id": "tied:1"}, reference | {"id": "ref:1"}, tied | {"id": "tied:2"}, reference | {"id": "ref:2"},
    )  # fmt: skip
    # 1: the right ones differ by 1, are 3 above the wrong one, the reference by 2. 2: all wrong.
    found = score("reward-bench-2", items, [(5, 4, 1), (2, 0), (3, 0, 1), (0, 1)])
    margins = (math.tanh(min(2, 3) / 1 - 1) + math.tanh(min(-1, -1) / 3 - 1)) / 2
    assert found["Ties"] == pytest.approx(0.3 * 0.5 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.5 + 0.01 * margins)


def test_rm_bench_is_hard_where_the_wrong_answer_is_the_fancier():
    items = read("rm-bench", {})
    # chosen 1, 2, 3 against rejected 0, 2.5, 4: better are [yes no no], [yes no no], [yes yes no]
    found = score("rm-bench", items, [(1, 2, 3, 0, 2.5, 4)])
    mean = pytest.approx((0 + 1 / 3 + 1) / 3)
    assert found == {"chat": mean, "hard": 0, "normal": pytest.approx(1 / 3), "easy": 1, "score": mean}


def test_rm_bench_pools_the_items_of_both_sides_of_safety():
    refuse, respond = {"domain": "safety-refuse"}, {"domain": "safety-response"}
    items = read("rm-bench", refuse, respond, respond, respond, {"domain": "math"})
    all_right, all_wrong, all_equal = (1, 1, 1, 0, 0, 0), (0, 0, 0, 1, 1, 1), (1, 1, 1, 1, 1, 1)
    found = score("rm-bench", items, [all_right, all_wrong, all_wrong, all_equal, all_right])
    # One of the four items of safety, where the mean of its sides would be (1 + 0) / 2; equal rewards are wrong.
    assert found["safety"] == 1 / 4 and found["math"] == 1
    # Each domain weighs the same.
    assert found["hard"] == found["normal"] == found["easy"] == found["score"] == (1 / 4 + 1) / 2


def test_judge_bench_by_category():
    items = read("judge-bench", {}, {"source": "livebench-math"}, {"label": "A>B"})
    found = score("judge-bench", items, [(0, 1), (1, 0), (1, 1)])
    assert found == {"Knowledge": 0.5, "Math": 0.0, "score": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("rewards", "right"),
    [((2, 1), {"A>B": 1, "B>A": 0, "A=B": 0}), ((1, 1), {"A>B": 0, "B>A": 1, "A=B": 0})],
)
def test_judge_bench_takes_equal_rewards_for_a_vote_for_b(rewards, right):
    for label, expected in right.items():
        assert score("judge-bench", read("judge-bench", {"label": label}), [rewards])["score"] == expected


def test_llm_bar():
    items = read("llm-bar", {}, {"label": 2})
    assert score("llm-bar", items, [(1, 0), (1, 0)]) == {"score": 0.5}


def test_llm_bar_counts_equal_ratings_half():
    # Both orders are tried and the second answer wins: wrong once and right once, for either label.
    items = read("llm-bar", {}, {}, {"label": 2})
    assert score("llm-bar", items, [(1, 0), (1, 1), (1, 1)]) == pytest.approx({"score": (1 + 1 / 2 + 1 / 2) / 3})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_weights_are_repetitions(name):
    changes = {"reward-bench": {"subset": "donotanswer"}, "reward-bench-2": {"subset": "Math"}}.get(name, {})
    items = read(name, {}, changes, {})
    size = len(items[0].answers)
    rewards = np.random.default_rng(0).normal(size=(3, size))
    weighted = score(name, items, list(rewards), [2.0, 1.0, 0.0])
    repeated = score(name, [items[0], items[0], items[1]], list(rewards[[0, 0, 1]]))
    assert weighted == pytest.approx(repeated)


# Any preference dataset


@pytest.mark.parametrize(
    ("judgement", "target", "people"),
    [
        ({}, 1, 1),
        ({"chosen_votes": 3, "rejected_votes": 1}, 0.75, 4),
        ({"chosen_votes": 0, "rejected_votes": 0}, 0.5, 0),
        ({"preference_probability": 0.6}, 0.6, 1),
        ({"tie": True}, 0.5, 1),
        ({"tie": False}, 1, 1),
        ({"tie": float("nan")}, 1, 1),
    ],
)
def test_what_was_said_of_a_pair(judgement, target, people):
    item = read_preference({"prompt": "a", "chosen": "b", "rejected": "c", **judgement})
    assert item.contents == ["ab", "ac"]
    assert said_in(item) == [(0, 1, target, people)]


def test_rankings_become_pairs_that_weigh_one(tiny_tokenizer):
    row = {"prompt": "a", "completions": ["b", "c", "d"], "ranks": [2, 1, 2]}
    assert said_in(read_preference(row)) == [(1, 0, 1, 1), (0, 2, 0.5, 1), (1, 2, 1, 1)]
    held_out = HeldOut.read([row], tiny_tokenizer)
    found = zip(held_out.first.tolist(), held_out.second.tolist(), held_out.target.tolist(), strict=True)
    assert list(found) == [(0, 1, 0), (0, 2, 0.5), (1, 2, 1)]
    assert held_out.weight.sum() == pytest.approx(1)


def test_a_prompt_that_the_conversation_repeats():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match=r"'prompt': a string in .* that hold it already; .*dataset.remove_columns"):
        read_preference({"prompt": "a", "chosen": messages, "rejected": messages})


def test_ratings_tools_and_subsets_are_kept():
    row = {"chosen": "b", "rejected": "c", "chosen_rating": [1, 2], "rejected_rating": 3, "tools": "[]", "subset": "x"}
    item = read_preference(row)
    assert item.ratings() == [[1, 2], [3]] and item.subset == "x" and item.template == {"tools": "[]"}
