"""Columns of judgements: what is refused, what becomes of a row in a batch, and that the loss is the likelihood's."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import SMALL_RUN, preferences

from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer
from disco_trl.data.columns import PREPARED, find_layout
from disco_trl.data.judgements import check_answerable, in_turn, log_readings, survey, to_tensors
from disco_trl.data.records import ranked_pairs, read_answers, read_feedback, read_record
from disco_trl.data.tokenization import tokenize
from disco_trl.data.values import BadRow, Problem, is_missing
from disco_trl.distributions.judgements import Judgements
from disco_trl.distributions.likelihood import Responses, log_likelihood
from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.models.inference import score
from disco_trl.models.likelihood_head import width_penalty


RANKING = {"completions": ["a", "b", "c"], "ranks": [1, 2, 2]}


# Rows


def problem_of(row: dict) -> Problem | None:
    """What is wrong with the judgements of a row, whose answers are sound."""
    row = row if row.keys() & {"completions", "ranks"} else {"chosen": "a", "rejected": "b", **row}
    try:
        read_record(row, find_layout(row))
    except BadRow as error:
        return error.problem
    return None


@pytest.mark.parametrize(
    ("row", "column", "wrong", "fix"),
    [
        ({"chosen_votes": 3}, "rejected_votes", "missing where 'chosen_votes' is given", "both, or neither"),
        ({"chosen_votes": -1, "rejected_votes": 2}, "chosen_votes", "-1 is not a number of votes", "0 or more"),
        ({"chosen_votes": 2, "rejected_votes": 0.5}, "rejected_votes", "0.5 is not a number of votes", ""),
        ({"chosen_votes": True, "rejected_votes": 1}, "chosen_votes", "True is not a number of votes", ""),
        ({"preference_probability": 1.2}, "preference_probability", "1.2 is not a probability", "from 0 to 1"),
        ({"preference_probability": "high"}, "preference_probability", "'high' is not a probability", ""),
        (
            {"preference_probability": 0.7, "chosen_votes": 7, "rejected_votes": 3},
            *("preference_probability", "together with votes", "remove one"),
        ),
        ({"tie": "yes"}, "tie", "'yes' is not true or false", "a forced choice"),
        ({"tie": True, "chosen_votes": 1, "rejected_votes": 0}, "tie", "votes for either side", "a row of their own"),
        ({"tie": True, "preference_probability": 0.5}, "tie", "soft label", "remove one"),
        ({"preference_strength": 1.5}, "preference_strength", "1.5 is not a strength", "whole number from -20 to 20"),
        ({"preference_strength": True}, "preference_strength", "True is not a strength", "or a list of them"),
        ({"preference_strength": "better"}, "preference_strength", "'better' is not a strength", "0 is a tie"),
        ({"preference_strength": 21}, "preference_strength", "21 is not a strength", "to 20"),
        ({"preference_strength": [1, math.nan]}, "preference_strength", "nan is not a strength", ""),
        ({"preference_strength": [1, None]}, "preference_strength", "None is not a strength", ""),
        ({"preference_strength": [[1]]}, "preference_strength", "[1] is not a strength", ""),
        ({"preference_strength": -math.inf}, "preference_strength", "-inf is not a strength", ""),
        (
            {"preference_strength": 2, "chosen_votes": 1, "rejected_votes": 0},
            *("preference_strength", "together with 'chosen_votes'", "remove one of the two"),
        ),
        (
            {"preference_strength": [2], "preference_probability": 0.9},
            *("preference_strength", "together with 'preference_probability'", "remove one of the two"),
        ),
        (
            {"preference_strength": 2, "tie": True},
            "tie",
            "True in a row of the strength 2",
            "a strength of 0 is a tie",
        ),
        ({"preference_strength": [0, 1], "tie": False}, "tie", "False in a row of the strengths", "remove it"),
        ({**RANKING, "preference_strength": 1}, "preference_strength", "in a row of ranked ones", "different rows"),
        ({"weight": -1.0}, "weight", "-1.0 is negative", "leaves the row out"),
        ({"weight": math.inf}, "weight", "inf is not a finite number", "1.0 for an ordinary row"),
        ({"margin": None}, "margin", "None is not a finite number", "0.0 for no margin"),
        ({"chosen_rating": "5 stars"}, "chosen_rating", "'5 stars' is not a rating", "a list of them"),
        ({"rejected_rating": [1, None]}, "rejected_rating", "None is not a rating", ""),
        ({"completions": ["a", "b"]}, "ranks", "missing where 'completions' is given", "both"),
        ({"ranks": [1, 2]}, "completions", "missing where 'ranks' is given", "both"),
        ({**RANKING, "ranks": [1, 2]}, "ranks", "2 ranks of 3 completions", "its rank"),
        ({"completions": ["a"], "ranks": [1]}, "completions", "cannot be ranked", "two or more"),
        ({**RANKING, "ranks": [1, "b", 3]}, "ranks", "'b' is not a rank", "1 for the best"),
        ({**RANKING, "ranks": [1, math.nan, 3]}, "ranks", "nan is not a rank", ""),
        ({**RANKING, "completions": "abc"}, "completions", "'abc' is not a list", ""),
        ({**RANKING, "tie": False}, "tie", "in a row of ranked ones", "different rows"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named_with_its_fix(row, column, wrong, fix):
    problem = problem_of(row)
    assert problem is not None
    assert (problem.column, wrong in problem.wrong, fix in problem.fix) == (column, True, True), problem


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"chosen_votes": None, "rejected_votes": math.nan, "tie": None, "weight": None, "chosen_rating": []},
        {"chosen_votes": 0, "rejected_votes": 0, "tie": True},
        {"chosen_votes": 7.0, "rejected_votes": np.int64(3), "tie": False, "weight": 2},
        {"preference_probability": 0.0, "tie": False, "chosen_rating": 4, "rejected_rating": [1.5, -2]},
        RANKING,
    ],
    ids=str,
)
def test_what_is_right_passes(row):
    assert problem_of(row) is None


def test_what_counts_as_missing():
    assert [is_missing(value) for value in (None, math.nan, [], np.float64("nan"), torch.tensor(math.nan))] == [
        True
    ] * 5
    assert [is_missing(value) for value in (0, 0.0, False, "", [0], torch.tensor(0))] == [False] * 6


def test_all_pairs_of_a_ranking_the_better_first():
    assert ranked_pairs([2, 1, 2]) == [(1, 0), (0, 2), (1, 2)]


# Datasets


def test_a_survey_finds_what_there_is_to_learn():
    rows = [
        {"chosen_votes": 1, "rejected_votes": 0, "tie": None, "chosen_rating": 3.0, "ranks": None},
        {"chosen_votes": None, "rejected_votes": None, "tie": False, "chosen_rating": None, "ranks": None},
        {"chosen_votes": None, "rejected_votes": None, "tie": None, "chosen_rating": None, "ranks": [1, 2, 3]},
    ]
    found = survey(Dataset.from_list(rows))
    assert not found.has_ties
    assert not found.has_several_ratings
    assert found.ratings == {3.0: 1}
    assert found.pairs_of_rows == {1, 3}
    for more in ({"tie": True}, {"tie": None, "ranks": [1, 1]}):
        assert survey(Dataset.from_list([*rows, {**rows[1], **more}])).has_ties
    for ratings, has_several in (([3.0], False), ([3.0, 3.0], True)):
        dataset = Dataset.from_list([{"rejected_rating": ratings, "chosen_votes": 5, "rejected_votes": 0}])
        assert survey(dataset).has_several_ratings == has_several
        assert survey(dataset.to_iterable_dataset()).has_several_ratings == has_several
    assert survey(Dataset.from_list([{"chosen": "a", "rejected": "b"}])).pairs_of_rows == {1}


def test_a_survey_counts_strengths_and_their_ties():
    def found(*given, **more):
        rows = [{"preference_strength": strengths, **more} for strengths in given]
        dataset = Dataset.from_list(rows)
        stream = survey(dataset.to_iterable_dataset())
        assert survey(dataset) == stream
        return stream

    assert found([2, -2, 1], None, [-1]).strengths == {2: 2, 1: 2}
    assert not found([2, -2, 1], [3]).has_ties
    assert found([2], [1, 0]).has_ties and found([0]).strengths == {0: 1}
    assert found([1]).said == {"preference_strength"} and found([1]).has_comparisons


@pytest.mark.parametrize(
    ("given", "likelihood", "message"),
    [
        (
            [1, -3],
            {"strength_levels": 2},
            r"row 1, column 'preference_strength': the strength -3 is beyond the 2 levels",
        ),
        ([0], {"strength_levels": 3}, r"row 1, column 'preference_strength': a tie, and the training data have none"),
        ([0], {}, r"row 1, column 'preference_strength': a tie, .*; give tie_width"),
    ],
)
def test_strengths_that_the_model_cannot_give_are_refused(given, likelihood, message):
    dataset = Dataset.from_list([{"preference_strength": [1]}, {"preference_strength": given}])
    with pytest.raises(ValueError, match=f"test dataset, {message}"):
        check_answerable(dataset, "test", survey(dataset), {"overall": likelihood})


def test_strengths_that_the_model_can_give_pass(caplog):
    dataset = Dataset.from_list([{"preference_strength": [1, -3, 0]}])
    found = survey(dataset)
    check_answerable(dataset, "test", found, {"overall": {"strength_levels": 3, "tie_width": "learned"}})
    assert caplog.messages == []
    check_answerable(dataset, "test", found, {"overall": {"tie_width": 0.3}})
    (message,) = caplog.messages
    assert "test dataset, column 'preference_strength': read as votes" in message and "strength_levels" in message


@pytest.mark.parametrize(
    ("likelihood", "meaning"),
    [({"strength_levels": 3}, ", on a scale from -3 to 3."), ({}, " (only the sign is read).")],
)
def test_how_strengths_are_read_is_logged(caplog, likelihood, meaning):
    log_readings("train", survey(Dataset.from_list([{"preference_strength": 2}])), {"overall": likelihood})
    assert f"preference_strength: how much better the chosen answer is, below 0 if it is worse{meaning}" in caplog.text


def rated(values, **more):
    """Rows of pairs, two ratings each, with the values in turn."""
    pairs = zip(values[::2], values[1::2], strict=True)
    return [
        {**row, "chosen_rating": chosen, "rejected_rating": rejected, **more}
        for row, (chosen, rejected) in zip(preferences("standard", len(values) // 2), pairs, strict=True)
    ]


def run(tiny_llama_dir, tmp_path, rows, **options):
    config = DiscoRewardConfig(str(tmp_path), **SMALL_RUN, **options)
    trainer = DiscoRewardTrainer(tiny_llama_dir, config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([number / 7 for number in range(40)], "40 different numbers among 40, as a reward model's scores are"),
        ([*range(110)] * 4, "110 different numbers among 440"),
        ([5] * 8, "all 8 are 5, which tells no answer from another"),
    ],
)
def test_numbers_that_are_no_scale_are_left_out_with_a_warning(tiny_llama_dir, tmp_path, caplog, values, why):
    rows = rated(values)
    bare = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    losses = [run(tiny_llama_dir, tmp_path, of).state.log_history[0]["loss"] for of in (rows, bare)]
    assert losses[0] == losses[1]
    (message,) = [message for message in caplog.messages if "not read as ratings" in message]
    assert message.startswith(f"train dataset, column 'chosen_rating' and 'rejected_rating': {why}")
    assert 'dataset.remove_columns(["chosen_rating", "rejected_rating"])' in message and "`columns`" in message
    # By several scores nothing about the model's own error is known either.
    several = [{**row, "chosen_rating": [row["chosen_rating"], 0.5]} for row in rated([n / 7 for n in range(40)])]
    assert "likelihood" not in run(tiny_llama_dir, tmp_path, several).model.config.disco


def test_numbers_that_are_no_scale_are_read_where_their_values_are_given(tiny_llama_dir, tmp_path, caplog):
    values = [number / 8 for number in range(22)]
    trainer = run(tiny_llama_dir, tmp_path, rated(values), rating_values=values)
    assert trainer.model.config.disco["likelihood"]["rating_values"] == values
    assert not any("not read as ratings" in message for message in caplog.messages)


def test_ratings_alone_that_are_no_scale_are_refused(tiny_llama_dir, tmp_path):
    rows = rated([number / 7 for number in range(40)], chosen_votes=0, rejected_votes=0)
    with pytest.raises(ValueError, match=r"nobody compared the answers.*40 different numbers among 40.*round them"):
        run(tiny_llama_dir, tmp_path, rows)


def test_columns_in_the_likelihood_are_logged_once_with_how_to_leave_them_out(tiny_llama_dir, tmp_path, caplog):
    rows = [{**row, "weight": 1.0, "margin": 0.5} for row in rated([5.0, 3.0, 9.0, 7.0, 4.5, 2.75, 10.0, 5.0])]
    run(tiny_llama_dir, tmp_path, rows)
    assert [message for message in caplog.messages if "in the likelihood" in message] == [
        "train dataset, columns in the likelihood: chosen_rating, rejected_rating: ratings of each answer, all on one "
        "scale of 7 values (2.75, 3, 4.5, 5, 7, 9, 10); weight: weights of the rows. If one means something else, "
        'leave it out: dataset.remove_columns(["chosen_rating", "rejected_rating", "weight"]), or, for '
        "`disco-trl train`, list the other columns as `columns` of the dataset in a --config file"
    ]
    caplog.clear()
    run(tiny_llama_dir, tmp_path, preferences("standard", 4, margin=True).to_list())
    assert not any("likelihood" in message for message in caplog.messages)


def test_a_checkpoint_that_knows_the_ratings_reads_them_on_a_scale_or_not(tiny_llama_dir, tmp_path, caplog):
    run(tiny_llama_dir, tmp_path / "one", rated([1.0, 2.0, 3.0, 2.0, 1.0, 3.0, 2.0, 1.0])).save_model()
    caplog.clear()
    run(str(tmp_path / "one"), tmp_path / "two", rated([2.0] * 8))
    (message,) = [message for message in caplog.messages if "rating" in message]
    assert "chosen_rating, rejected_rating: ratings of each answer, all on one scale of 1 value (2)" in message


def test_rankings_are_logged_with_their_answers(caplog):
    log_readings("train", survey(Dataset.from_list([RANKING])), {"overall": {}})
    assert "columns in the likelihood: completions, ranks: ranked answers." in caplog.text


def test_completions_that_nobody_ranked_are_not_read_beside_a_pair(tiny_llama_dir, tmp_path):
    rows = preferences("standard", 8).to_list()
    losses = [
        run(tiny_llama_dir, tmp_path, of).state.log_history[0]["loss"]
        for of in (rows, [{**row, "completions": ["a", "b"]} for row in rows])
    ]
    assert losses[0] == losses[1]
    # In a mixture with rankings a pair may have some as well.
    pair = {"chosen": "x", "rejected": "y", "completions": ["a", "b"], "ranks": None}
    assert read_record(pair, find_layout(pair)).answers == ["x", "y"]


def test_a_survey_does_not_compare_the_answers_of_an_endless_ranking():
    assert survey(Dataset.from_list([{"ranks": [*range(100_000)]}])).pairs_of_rows == {1}


# Batches


def tensors(rows, weigh_by="pair", rating_values=None, pairs_per_row=None, strength_levels=None):
    rows = [{"chosen_ids": [1], "rejected_ids": [2], **row} for row in rows]
    rows = [row | {"completion_ids": [[1]] * len(row.get("ranks", []))} for row in rows]
    records = [read_answers(row, PREPARED, read_feedback(row)) for row in rows]
    comparisons = [in_turn(record, weigh_by, bool(rating_values), pairs_per_row) for record in records]
    found = to_tensors(records, comparisons, rating_values, strength_levels)
    return {key: value.tolist() for key, value in found.items()}


def test_each_row_becomes_its_outcomes():
    rows = [
        {},
        {"chosen_votes": 7, "rejected_votes": 3, "weight": 2.0},
        {"preference_probability": 0.8},
        {"tie": True},
        {"tie": False, "margin": 0.5},
    ]
    assert tensors(rows)["judgements"] == [
        pytest.approx(row)
        for row in (
            # wins, losses, ties, tie allowed, margin, weight
            [1, 0, 0, 0, 0, 1],
            [7, 3, 0, 0, 0, 0.2],  # ten votes that together weigh 2
            [0.8, 0.2, 0, 0, 0, 1],
            [0, 0, 1, 1, 0, 1],
            [1, 0, 0, 1, 0.5, 1],
        )
    ]
    assert [row[-1] for row in tensors(rows, weigh_by="vote")["judgements"]] == [1, 2, 1, 1, 1]


def test_ratings_are_counted_and_share_the_weight():
    rows = [{"chosen_votes": 0, "rejected_votes": 0, "chosen_rating": [5, 1, 5.0], "rejected_rating": 1}, {}]
    found = tensors(rows, rating_values=[1.0, 3.0, 5.0])
    assert found["rating_counts"] == [[1, 0, 2], [0, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert found["judgements"][0] == pytest.approx([0, 0, 0, 0, 0, 0.25])
    with pytest.raises(
        ValueError, match=r"row 0 of the batch, .*'rejected_rating': the rating 2 is not .*\(1, 3, 5\)"
    ):
        tensors([{"rejected_rating": 2}], rating_values=[1.0, 3.0, 5.0])


def test_strengths_are_counted_by_side_and_level():
    rows = [
        {"preference_strength": [2, -1, 0, 2], "margin": 0.5, "weight": 2.0},
        {"chosen_votes": 2, "rejected_votes": 1},
        {"ranks": [1, 2]},
    ]
    found = tensors([{"margin": 0.0, **row} for row in rows], strength_levels=3)
    # Wins of strength 1, 2, 3 and then losses; votes and rankings have no strength.
    assert found["strength_counts"] == [[0, 2, 0, 1, 0, 0], [0] * 6, [0] * 6]
    assert found["judgements"] == [
        pytest.approx(row) for row in ([2, 1, 1, 1, 0.5, 2 / 4], [2, 1, 0, 0, 0, 1 / 3], [1, 0, 0, 0, 0, 1])
    ]
    by_vote = tensors([{"margin": 0.0, **row} for row in rows], "vote", strength_levels=3)["judgements"]
    assert [row[-1] for row in by_vote] == [2, 1, 1]
    # A model that knows no levels reads votes.
    assert "strength_counts" not in tensors(rows[:1])
    assert tensors(rows[:1])["judgements"] == tensors(rows[:1], strength_levels=2)["judgements"]


def test_a_strength_beyond_the_levels_is_named_with_its_row():
    with pytest.raises(
        ValueError, match=r"row 1 of the batch, column 'preference_strength': the strength -3 is beyond"
    ):
        tensors([{"preference_strength": 2}, {"preference_strength": [1, -3]}], strength_levels=2)


def test_strengths_become_the_likelihood_of_their_signs_where_there_is_one_level():
    """With one level there is no boundary to learn: the likelihood is that of the votes and ties."""
    strengths = tensors([{"preference_strength": [1, 1, -1, 0]}], strength_levels=1)
    batch = {name: torch.tensor(values) for name, values in strengths.items()}
    graded, plain = (Judgements.of_batch({**batch, **more}) for more in ({}, {"strength_counts": None}))
    sides = [RewardDistribution(torch.tensor([mean]), torch.tensor([0.8]), "normal") for mean in (0.7, 0.2)]
    responses = Responses(tie_width=torch.tensor(0.3), strength_boundaries=torch.empty(0))
    torch.testing.assert_close(log_likelihood(*sides, graded, responses), log_likelihood(*sides, plain, responses))


def test_a_ranking_becomes_all_its_pairs():
    found = tensors([{"ranks": [2, 1, 2]}, {}])["judgements"]
    # Three pairs that together weigh 1, as the forced choice does; times 4 pairs / 2 rows, for the mean is over pairs
    assert found == [
        pytest.approx([1, 0, 0, 1, 0, 2 / 3]),
        pytest.approx([0, 0, 1, 1, 0, 2 / 3]),
        pytest.approx([1, 0, 0, 1, 0, 2 / 3]),
        pytest.approx([1, 0, 0, 0, 0, 2]),
    ]


def test_repeated_pairs_share_their_weight():
    # Rows of three and of one pair, as rows of three: 6 pairs / 2 rows
    found = torch.tensor(tensors([{"ranks": [1, 2, 3]}, {}], pairs_per_row=3)["judgements"])
    assert found[:, -1].tolist() == pytest.approx([1] * 6)
    found = torch.tensor(tensors([{"ranks": [1, 2, 3]}], pairs_per_row=4)["judgements"])
    assert found[:, -1].tolist() == pytest.approx([x * 4 / 3 for x in (0.5, 1, 1, 0.5)])


# Training


def mixed_rows() -> list[dict]:
    base = list(preferences("standard", 8))
    rows = [
        base[0],
        {**base[1], "chosen_votes": 7, "rejected_votes": 3},
        {**base[2], "preference_probability": 0.8},
        {**base[3], "tie": True},
        {**base[4], "tie": False, "weight": 2.0},
        {**base[5], "chosen_rating": [1, 2, 2], "rejected_rating": [0, 1]},
        {**base[6], "chosen_votes": 0, "rejected_votes": 0, "chosen_rating": [3]},
        {"prompt": base[7]["prompt"], "completions": ["film", "short piano", "a day"], "ranks": [2, 1, 2]},
    ]
    names = sorted({name for row in rows for name in row})
    return [{name: row.get(name) for name in names} for row in rows]


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("family", ["normal", "mixture"])
def test_the_loss_is_the_likelihood_of_every_kind_of_row(tiny_llama_dir, tmp_path, family, prefix_sharing):
    """The first step's loss against one worked out row by row from the rewards of the model before it."""
    rows = mixed_rows()
    config = DiscoRewardConfig(
        str(tmp_path),
        **{**SMALL_RUN, "max_steps": 1, "per_device_train_batch_size": 8},
        reward_family=family,
        prefix_sharing=prefix_sharing,
        label_noise=0.1,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = DiscoRewardTrainer(tiny_llama_dir, config, train_dataset=Dataset.from_list(rows))
    model, tokenizer = trainer.model, trainer.processing_class
    assert model.config.disco["likelihood"] == {
        "location_error": True,
        "tie_width": "learned",
        "label_noise": 0.1,
        "rating_values": [0.0, 1.0, 2.0, 3.0],
    }
    torch.nn.init.normal_(model.scale_head.weight)

    def reward(text: str) -> RewardDistribution:
        return score(model, [tokenize(tokenizer, text)])

    with torch.no_grad():
        output = model(torch.tensor([tokenize(tokenizer, "film")]))
        responses = model.responses_of(output)
    assert responses.label_noise.item() == pytest.approx(0.1)
    expected = 0.0
    for row in rows:
        if row["completions"]:
            answers = [reward(row["prompt"] + answer) for answer in row["completions"]]
            pairs = [(1, 0, 1.0), (0, 2, 0.0), (1, 2, 1.0)]
            for better, worse, win in pairs:
                said = [torch.tensor([x]) for x in (win, 0.0, 1 - win, 1.0, 0.0, 1.0)]
                pair = (answers[better], answers[worse])
                expected += log_likelihood(*pair, Judgements(*said), responses).item() / 3
            continue
        table = tensors([{**row, "ranks": []}], rating_values=[0.0, 1.0, 2.0, 3.0])
        judgements = Judgements.of_batch({name: torch.tensor(values) for name, values in table.items()})
        sides = [reward(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        one = log_likelihood(*sides, judgements, responses)
        expected += (judgements.weight * one).item()
    # The prior of the widths between thresholds counts once in the run, which has one step.
    prior = width_penalty(model.reward_head.likelihood.values(), model.family.unit_scale).item()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((prior - expected) / 8, rel=1e-5)


def test_accuracy_is_that_of_votes(tiny_llama_dir, tmp_path):
    """Pairs of which the rejected side won 9 to 1: as often as the model puts the chosen side first, it is wrong."""
    rows = [{**row, "chosen_votes": 1, "rejected_votes": 9} for row in preferences("standard", 8)]
    config = DiscoRewardConfig(
        str(tmp_path), **{**SMALL_RUN, "max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.0}
    )
    trainer = DiscoRewardTrainer(tiny_llama_dir, config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    ahead = 0
    for row in rows:
        sides = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        chosen, rejected = score(trainer.model, [tokenize(trainer.processing_class, text) for text in sides]).location
        ahead += int(chosen > rejected)
    expected = (ahead * 0.1 + (8 - ahead) * 0.9) / 8
    assert trainer.state.log_history[0]["accuracy"] == pytest.approx(expected)


def test_ratings_alone_log_no_likelihood_of_votes(tiny_llama_dir, tmp_path):
    said = {"chosen_votes": 0, "rejected_votes": 0, "chosen_rating": [1, 2], "rejected_rating": [2]}
    dataset = Dataset.from_list([{**row, **said} for row in preferences("standard", 8)])
    trainer = DiscoRewardTrainer(tiny_llama_dir, DiscoRewardConfig(str(tmp_path), **SMALL_RUN), train_dataset=dataset)
    trainer.train()
    assert "nll" not in trainer.state.log_history[0]
    assert trainer.state.log_history[0]["location_error"] > 0


@pytest.mark.parametrize(
    ("options", "train", "evaluated", "message"),
    [
        ({}, {"chosen_rating": 2}, {"rejected_rating": [1.0, 5.0]}, "more .*'rejected_rating': .*cannot give 5;"),
        ({"rating_values": [2, 3]}, {"chosen_rating": 1}, {}, "train .*'chosen_rating': .*cannot give 1;"),
        ({}, {}, {"tie": True}, "more .*'tie': a tie, and the training data have none"),
    ],
    ids=["a rating", "a rating of training", "a tie"],
)  # fmt: skip
def test_what_the_model_cannot_answer_is_refused_before_training(
    tiny_llama_dir, tmp_path, options, train, evaluated, message
):
    rows = [
        {**row, "chosen_rating": 1 + index % 2, "rejected_rating": [2.0]}
        for index, row in enumerate(preferences("standard", 8))
    ]
    if "rating_values" in options:
        rows = [{**row, "chosen_rating": 2} for row in rows]
    datasets = [Dataset.from_list([*rows[:3], {**rows[3], **more}, *rows[4:]]) for more in (train, evaluated)]
    if "tie" in evaluated:
        datasets[1] = Dataset.from_list([{**row, "tie": index == 3} for index, row in enumerate(rows)])
    config = DiscoRewardConfig(str(tmp_path), **SMALL_RUN, **options)

    def trainer(config):
        return DiscoRewardTrainer(
            tiny_llama_dir, config, train_dataset=datasets[0], eval_dataset={"good": datasets[0], "more": datasets[1]}
        )

    with pytest.raises(ValueError, match=message.replace(" ", " dataset, row 3, column ", 1)):
        trainer(config)
    if "tie" in evaluated:
        trainer(DiscoRewardConfig(str(tmp_path), **SMALL_RUN, tie_width=0.3)).evaluate()


def test_what_was_learned_of_people_is_saved_and_goes_on(tiny_llama_dir, tmp_path):
    dataset = Dataset.from_list(mixed_rows())
    config = DiscoRewardConfig(str(tmp_path / "one"), **SMALL_RUN, label_noise=None)
    trainer = DiscoRewardTrainer(tiny_llama_dir, config, train_dataset=dataset)
    first = {name: value.clone() for name, value in trainer.model.score.likelihood.state_dict().items()}
    assert first.keys() == {"location_error", "tie_width", "label_noise", "thresholds"}
    trainer.train()
    trainer.save_model()
    learned = trainer.model.score.likelihood.state_dict()
    assert not any(torch.equal(first[name], learned[name]) for name in first)
    loaded = DiscoRewardModel.from_pretrained(tmp_path / "one")
    torch.testing.assert_close(loaded.score.likelihood.state_dict(), learned, rtol=0, atol=0)
    sequences = [[5, 6, 7], [8, 9]]
    ours, theirs = score(loaded, sequences), score(trainer.model, sequences)
    torch.testing.assert_close(ours.location_error, theirs.location_error)
    assert (ours.prob_greater(ours[[1, 0]]) - 0.5).abs().max() < (
        RewardDistribution(ours.location, ours.scale, "normal").prob_greater(
            RewardDistribution(ours.location[[1, 0]], ours.scale[[1, 0]], "normal")
        )
        - 0.5
    ).abs().max()

    # Going on from it, on data that say less and more
    plain = DiscoRewardTrainer(
        str(tmp_path / "one"), DiscoRewardConfig(str(tmp_path / "two"), **SMALL_RUN), train_dataset=preferences(rows=8)
    )
    torch.testing.assert_close(plain.model.score.likelihood.state_dict(), learned, rtol=0, atol=0)
    strange = dataset.add_column("row", list(range(8))).map(
        lambda row: {"chosen_rating": [17] if row["chosen_rating"] else None}
    )
    with pytest.raises(ValueError, match="the data have the rating 17, but the checkpoint knows only 0, 1, 2, 3"):
        DiscoRewardTrainer(
            str(tmp_path / "one"), DiscoRewardConfig(str(tmp_path / "two"), **SMALL_RUN), train_dataset=strange
        )


def test_one_vote_a_pair_learns_no_error(tiny_llama_dir, tmp_path):
    trainer = DiscoRewardTrainer(
        tiny_llama_dir, DiscoRewardConfig(str(tmp_path), **SMALL_RUN), train_dataset=preferences(rows=8)
    )
    assert "likelihood" not in trainer.model.config.disco
    assert trainer.model.score.likelihood is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["film", ""]}, r"row 7, column 'completions': answer 1: an empty string"),
        ({"ranks": [1, 2, 3]}, r"row 7, column 'ranks': 3 ranks of 2 completions"),
        ({"chosen": "film"}, r"row 7, column 'chosen': given beside ranked completions"),
    ],
    ids=str,
)
def test_a_bad_ranking_is_named(tiny_llama_dir, tmp_path, change, message):
    rows = mixed_rows()
    rows[7] = {**rows[7], "completions": ["film", "day"], "ranks": [1, 2], **change}
    with pytest.raises(ValueError, match=message):
        DiscoRewardTrainer(
            tiny_llama_dir,
            DiscoRewardConfig(str(tmp_path), **SMALL_RUN),
            train_dataset=Dataset.from_list(rows),
        )


def test_rankings_with_too_long_an_answer_are_dropped(tiny_llama_dir, tmp_path):
    rows = mixed_rows()
    rows[7]["completions"] = ["film", "day", " ".join(["day"] * 40)]
    config = DiscoRewardConfig(str(tmp_path), **SMALL_RUN, max_length=30)
    trainer = DiscoRewardTrainer(tiny_llama_dir, config, train_dataset=Dataset.from_list(rows))
    assert trainer.train_dataset["row_index"][:] == [0, 1, 2, 3, 4, 5, 6]
