"""What has to hold whatever comes in: the maths, the collator, the converters, the check of rows."""

import math
import random

import numpy as np
import pytest
import torch
from forests import prefixes_by_place
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_data
from disco_trl.data.collator import ANSWERS, DataCollatorForDiscoPreference
from disco_trl.data.columns import find_layout
from disco_trl.data.curation.convert import Converter, Report
from disco_trl.data.curation.formats import FORMATS
from disco_trl.data.forest import Forest
from disco_trl.data.records import read_record
from disco_trl.data.values import BadRow
from disco_trl.distributions.reward_distribution import FAMILIES, get_family


PAD = 0


# The maths

SHAPES = st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95))
WIDE = st.floats(-1e4, 1e4)
SCALES = st.floats(1e-3, 1e3)


def log_prob(family, *values: object) -> torch.Tensor:
    return family.log_prob_greater(*(torch.tensor(value, dtype=torch.float64) for value in values))


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(deadline=None, max_examples=60, derandomize=True)
@given(loc_a=WIDE, loc_b=WIDE, scale_a=SCALES, scale_b=SCALES, shape_a=SHAPES, shape_b=SHAPES)
def test_one_of_two_rewards_is_the_higher(name, loc_a, loc_b, scale_a, scale_b, shape_a, shape_b):
    family = get_family(name)
    ahead = log_prob(family, loc_a, scale_a, loc_b, scale_b, shape_a, shape_b).exp()
    behind = log_prob(family, loc_b, scale_b, loc_a, scale_a, shape_b, shape_a).exp()
    assert (ahead + behind).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    loc_a=st.floats(-1e30, 1e30),
    loc_b=st.floats(-1e30, 1e30),
    scale_a=SCALES,
    scale_b=SCALES,
    shape_a=SHAPES,
    shape_b=SHAPES,
)
def test_the_likelihood_of_extreme_rewards_is_finite(name, loc_a, loc_b, scale_a, scale_b, shape_a, shape_b):
    value = log_prob(get_family(name), loc_a, scale_a, loc_b, scale_b, shape_a, shape_b)
    assert value.isfinite() and value <= 0


# The collator

sequences = st.lists(st.integers(1, 4), min_size=1, max_size=9)
pairs = st.fixed_dictionaries({"chosen_ids": sequences, "rejected_ids": sequences})
votes = st.fixed_dictionaries({"chosen_votes": st.integers(0, 5), "rejected_votes": st.integers(0, 5)})
strengths = st.lists(st.integers(-3, 3), min_size=1, max_size=4)
rankings = st.lists(sequences, min_size=2, max_size=4).flatmap(
    lambda answers: st.fixed_dictionaries(
        {
            "chosen_ids": st.just(answers[0]),
            "rejected_ids": st.just(answers[-1]),
            "completion_ids": st.just(answers),
            "ranks": st.lists(st.integers(1, 3), min_size=len(answers), max_size=len(answers)),
        }
    )
)


def read_back(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The sequences of a batch, whichever way it was made; tokens that pad are 0, and no sequence holds one."""
    if "nodes" not in batch:
        return [[token for token in row if token != PAD] for row in batch["input_ids"].tolist()]
    lengths, parents = batch["nodes"].lengths, batch["nodes"].parents
    forest = Forest(batch["input_ids"][0].tolist(), [], lengths, parents, [])
    found = prefixes_by_place(forest)
    return [list(found[place]) for place in batch["read_at"].tolist()]


def collated(examples: list[dict], **options) -> tuple[dict, dict]:
    options = {"likelihoods": {"overall": {"tie_width": "learned"}}} | options
    return tuple(
        DataCollatorForDiscoPreference(pad_token_id=PAD, share_prefixes=share, **options)(examples)
        for share in (False, True)
    )


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(pairs, min_size=1, max_size=5))
def test_a_batch_holds_each_sequence_of_its_pairs(examples):
    expected = [example[side] for side in ("chosen_ids", "rejected_ids") for example in examples]
    padded, shared = collated(examples)
    assert read_back(padded) == read_back(shared) == expected
    assert padded[ANSWERS].tolist() == shared[ANSWERS].tolist()
    # Equal answers have one number, and others have others.
    numbers = padded[ANSWERS].tolist()
    assert len({*zip(map(tuple, expected), numbers, strict=True)}) == len({*numbers}) == len({*map(tuple, expected)})


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(pairs | rankings, votes), min_size=1, max_size=4), st.sampled_from(["pair", "vote"]))
def test_sharing_prefixes_does_not_change_what_was_judged(rows, weigh_by):
    # As in a dataset, all rows have all columns.
    columns = dict.fromkeys(("completion_ids", "ranks", "chosen_votes", "rejected_votes"))
    examples = [columns | example | ({} if "ranks" in example else said) for example, said in rows]
    padded, shared = collated(examples, weigh_by=weigh_by)
    assert read_back(padded) == read_back(shared)
    torch.testing.assert_close(padded["judgements"], shared["judgements"], rtol=0, atol=0)
    assert len(padded["judgements"]) * 2 == len(padded["input_ids"])
    if weigh_by == "pair":
        # What is said in a row weighs 1 together, however many pairs it stands for; nothing said weighs nothing.
        wins, losses, ties, *_, weight = padded["judgements"].unbind(dim=-1)
        silent = sum(
            example["ranks"] is None and not sum(said.values())
            for example, (_, said) in zip(examples, rows, strict=True)
        )
        total = ((wins + losses + ties) * weight).sum().item() * len(examples) / len(weight)
        assert total == pytest.approx(len(examples) - silent, rel=1e-5)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.tuples(pairs, strengths), min_size=1, max_size=4))
def test_a_batch_counts_each_strength_once(rows):
    examples = [pair | {"preference_strength": given} for pair, given in rows]
    padded, shared = collated(examples, likelihoods={"overall": {"strength_levels": 3, "tie_width": "learned"}})
    torch.testing.assert_close(padded["strength_counts"], shared["strength_counts"], rtol=0, atol=0)
    won, lost = padded["strength_counts"].split(3, dim=-1)
    wins, losses, ties, *_ = padded["judgements"].unbind(dim=-1)
    assert won.sum(-1).tolist() == wins.tolist() and lost.sum(-1).tolist() == losses.tolist()
    assert ties.tolist() == [given.count(0) for _, given in rows]
    # The other way around, each side's counts are the other's.
    mirrored, _ = collated(
        [
            {
                "chosen_ids": pair["rejected_ids"],
                "rejected_ids": pair["chosen_ids"],
                "preference_strength": [-n for n in given],
            }
            for pair, given in rows
        ],
        likelihoods={"overall": {"strength_levels": 3, "tie_width": "learned"}},
    )
    assert mirrored["strength_counts"].tolist() == torch.cat([lost, won], dim=-1).tolist()


# Rows


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_row_is_converted_or_refused_by_its_column(seed):
    rng = random.Random(seed)
    row = fuzz_data.mutated(rng.choice(fuzz_data.SOUND), rng)
    for name, known in FORMATS.items():
        known.recognise(row)
        try:
            Converter(known.convert, Report(name))(row, 7)
        except ValueError as error:
            assert str(error).startswith("row 7, column '") and "; " in str(error)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(0, 2**32))
def test_a_row_is_sound_or_its_problem_has_a_place_and_a_fix(seed):
    rng = random.Random(seed)
    row = fuzz_data.mutated(rng.choice(fuzz_data.SOUND), rng)
    try:
        read_record(row, find_layout(row))
    except BadRow as error:
        assert all(isinstance(part, str) and part for part in error.problem)
        assert len(error.problem.wrong) < 1000  # however long the value is


PAIR = {"prompt": "Two and two? ", "chosen": "Four.", "rejected": "Five."}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Two and two?"}],
    **{side: {"from": "gpt", "value": value} for side, value in (("chosen", "Four."), ("rejected", "Five."))},
}
LLM_BAR = {"input": "Two and two?", "output_1": "Four.", "output_2": "Five.", "label": 1}


@pytest.mark.parametrize(
    ("step", "row"),
    [
        ("train", PAIR | {"margin": np.array(1.0)}),
        ("train", PAIR | {"chosen_rating": [np.array(1.0), 4], "rejected_rating": 1}),
        ("train", {"completions": ["4", "5", "6"], "ranks": [1, 3, 1], "chat_template_kwargs": math.nan}),
        ("train", {"completions": ["4", "5", "6"], "ranks": [np.array(1), 3, 1]}),
        ("convert", SHAREGPT | {"tools": torch.tensor([1, 2])}),
        ("evaluate", LLM_BAR | {"subset": torch.tensor([1, 2])}),
        ("evaluate", PAIR | {"chosen_votes": np.array(1), "rejected_votes": torch.tensor(1.0)}),
    ],
)
def test_what_the_fuzzer_found_stays_fixed(step, row):
    getattr(fuzz_data.DataPath(), step)(row)


def test_the_fuzzer_tells_a_find_from_a_refusal(monkeypatch, capsys):
    arguments = ["fuzz_data.py", "--rows", "150", "--seed", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        fuzz_data.main()
    assert ended.value.code == 0, capsys.readouterr().out
    monkeypatch.setattr(fuzz_data, "find_layout", lambda row: row["no such column"])
    with pytest.raises(SystemExit) as ended:
        fuzz_data.main()
    assert ended.value.code == 1
    assert "check and train: KeyError" in capsys.readouterr().out
