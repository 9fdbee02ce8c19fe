"""
One record for a row of preferences, whichever way the row is written.

What flows, from a dataset to a batch:

1. **Columns.** [`find_layout`] infers from the first row which columns hold the answers and whether these are text,
   messages or token ids. Other columns say what people said about the answers, see below.
2. **Record.** [`read_record`] reads a row once. It checks the contents and the judgements, and either returns K
   answers, comparisons between them and their ratings, or raises [`BadRow`] with the column, what is wrong and the
   fix. A pair is a record of K = 2 answers with one comparison. A ranking has a comparison for each pair of its K
   answers. Whatever comes after may trust the record.
3. **Problems.** Training stops at the first bad row (`validation`), `disco-trl data check` counts all of them
   (`curation.check`), and conversion and evaluation name the row.
4. **Token ids.** [`Record.contents`] puts each answer behind its prompt, which `tokenization` turns into ids. Prepared
   datasets keep them in TRL's columns `chosen_ids` and `rejected_ids`, and those of all answers of a ranking in
   `completion_ids`.
5. **Batch.** The collator reads a prepared row as a record of token ids, and `judgements.to_tensors` turns the
   comparisons and ratings into tensors.

A row is one person's forced choice of `chosen`, unless its columns say more:

- `chosen_votes`, `rejected_votes`: how many people preferred which (0 and 0: nobody compared the two);
- `preference_probability`: a soft label, P(chosen ≻ rejected);
- `preference_strength`: how much better `chosen` is, a whole number or a list of several people's: below 0 if it is
  worse, 0 if the two are equal;
- `tie`: true if the two were called equal, false if they could have been, and absent for a forced choice;
- `margin`: TRL's, by how much the chosen answer has to be better, in units of reward;
- `chosen_rating`, `rejected_rating`: a number, or a list of several people's numbers;
- `completions` and `ranks`, in place of `chosen` and `rejected`: K answers and the rank of each, 1 the best;
- `completion_ratings`, beside `ranks` or in their place: a list with the ratings of each of the K answers;
- `attribute`: what the comparison of the row is about, such as `"safety"`, where it is not the overall judgement;
- `weight`: multiplies the log-likelihood of the row.

Ratings may be about attributes as well: `{"helpfulness": 4, "verbosity": 2}`, or lists with one number a rater in the
same order for each attribute, and None where a rater did not say. Numbers outside of a dict are about the overall
judgement, which is the attribute `"overall"`.

Any of them may be missing (None or NaN) in any row. A prompt that is missing is no prompt: the answers stand by
themselves. (In pairs a column `prompt` that is there has to be filled, because TRL reads it.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from .columns import (
    ATTRIBUTE,
    JUDGEMENT_COLUMNS,
    OVERALL,
    RANKED_IDS,
    RANKED_RATINGS,
    RANKING,
    RATINGS,
    STRENGTH,
    TEMPLATE_COLUMNS,
    TEXT_PAIR,
    VOTES,
    Layout,
    find_layout,
    is_ranking,
)
from .contents import check_contents
from .values import BadRow, Row, as_list, as_number, as_ratings, as_truth, by_attribute, is_missing, shown


MOST_RANKED = 256
"""Most answers of a ranking: its 32,640 pairs are rows and columns of a batch, and grow with the square."""

MOST_LEVELS = 20
"""Most levels of strength: each has a boundary to learn, and a number beyond it is no grade."""

LONGEST_NAME = 64
"""Most characters of the name of an attribute. A longer text is a remark."""

_COLUMNS = (*JUDGEMENT_COLUMNS, "ranks")


@dataclass(frozen=True, slots=True)
class Comparison:
    """
    What people said about two answers of a record.

    Args:
        first, second (`int`):
            Positions of the answers in the record.
        wins, losses, ties (`float`):
            How often the first answer won, lost and tied. A soft label is a part of a win and the rest of a loss.
        strengths (`tuple[int, ...]`):
            How strong some of the wins (above 0) and losses (below 0) are, one number for each.
        attribute (`str`):
            What they were compared in.
        tie_allowed (`bool`):
            Whether a tie could have been said.
        margin (`float`):
            TRL's margin, in units of reward.
        weight (`float`):
            Weight of the row, which all that is said in it shares.
    """

    first: int
    second: int
    wins: float = 1.0
    losses: float = 0.0
    ties: float = 0.0
    tie_allowed: bool = False
    margin: float = 0.0
    weight: float = 1.0
    strengths: tuple[int, ...] = ()
    attribute: str = OVERALL

    def about(self, attribute: str) -> Comparison:
        """What was said about the two in this attribute; without any judgement if it was about another one."""
        if attribute == self.attribute:
            return self
        return replace(self, wins=0.0, losses=0.0, ties=0.0, strengths=(), tie_allowed=False)

    @property
    def people(self) -> float:
        """How many people compared the two."""
        return self.wins + self.losses + self.ties

    @property
    def target(self) -> float:
        """The share of them who prefer the first answer, where a tie counts half for each; ½ if nobody did."""
        return (self.wins + self.ties / 2) / self.people if self.people else 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """
    What people said in a row.

    Args:
        comparisons (`Sequence[Comparison]`):
            Comparisons between answers.
        rated (`Mapping[str, Sequence[list]]`):
            People's ratings by attribute and, within it, of each answer. The lists of one answer hold the same raters
            in the same order, with None where one of them did not rate the attribute.
        said (`frozenset[str]`):
            The columns that say it, as far as they are filled.
    """

    comparisons: Sequence[Comparison] = (Comparison(0, 1),)
    rated: Mapping[str, Sequence[list[float | None]]] = field(default_factory=dict)
    said: frozenset[str] = frozenset()

    def ratings(self, attribute: str = OVERALL) -> Sequence[list[float]]:
        """People's ratings of each answer in an attribute; empty if there are none at all."""
        return [[rating for rating in given if rating is not None] for given in self.rated.get(attribute, ())]

    @property
    def attributes(self) -> set[str]:
        """What something was said about."""
        compared = {comparison.attribute for comparison in self.comparisons if comparison.people}
        return compared | {name for name in self.rated if any(self.ratings(name))}

    @property
    def is_ranking(self) -> bool:
        """Whether the answers were ranked or rated in a row of several."""
        return not self.said.isdisjoint(("ranks", RANKED_RATINGS))

    @property
    def has_tie(self) -> bool:
        """Whether some answers were called equal."""
        return any(comparison.ties for comparison in self.comparisons)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record(Feedback):
    """
    A row of preferences: K answers, and what people said about them.

    Args:
        answers (`Sequence`):
            The K answers without their prompt, each a text, a list of messages or a list of token ids.
        columns (`Sequence[str]`):
            Column of each answer.
        kind (`str`):
            Whether they are `"standard"`, `"conversational"` or `"tokenized"`.
        prompt (`str` or `list[dict]`, *optional*, defaults to `None`):
            What is put before each answer.
        template (`dict`):
            `tools` and `chat_template_kwargs`, if the row has any.
    """

    answers: Sequence[Any]
    columns: Sequence[str] = TEXT_PAIR
    kind: str = "conversational"
    prompt: Any = None
    template: dict[str, Any] = field(default_factory=dict)

    @property
    def contents(self) -> list[Any]:
        """The K answers, each after the prompt; token ids as they are."""
        return [join(self.prompt, answer) for answer in self.answers]

    def parts(self) -> Iterator[tuple[str, Any]]:
        """The prompt, if there is one, and the answers, each with its column."""
        if self.prompt is not None:
            yield "prompt", self.prompt
        yield from zip(self.columns, self.answers, strict=True)


def join(prompt: Any, answer: Any) -> Any:
    """An answer after its prompt, as text or as messages. A prompt that is None is none."""
    return answer if prompt is None else prompt + answer


def read_record(row: Row, layout: Layout) -> Record:
    """
    Read a row of preferences: its answers, and what people said about them.

    Args:
        row (`dict`):
            Row of a dataset.
        layout ([`Layout`]):
            Layout of the dataset.

    Returns:
        [`Record`]: The record, which is sound.

    Raises:
        [`BadRow`]: If something is wrong with the row.
    """
    if is_ranking(row):
        record = read_answers(row, layout, read_feedback(row, with_answers=True))
        beside = [side for side in TEXT_PAIR if record.kind != "tokenized" and not is_missing(row.get(side))]
        if beside:
            raise BadRow(beside[0], "given beside ranked completions", "put pairs and rankings into different rows")
        # TRL does not read rankings, so what is missing here is missing for nobody.
        read = {name: row[name] for name in ("prompt", *TEMPLATE_COLUMNS) if not is_missing(row.get(name))}
        for index, answer in enumerate(record.answers):
            try:
                check_contents([(record.columns[index], answer)], read, record.kind)
            except BadRow as error:
                column, wrong, fix = error.problem
                where = f"answer {index}: " if column == record.columns[index] else ""
                raise BadRow(column, where + wrong, fix) from error
        return record
    parts = [(name, row.get(name)) for name in layout.columns]
    check_contents(parts, row, layout.kind, layout.takes_prompt)
    return read_answers(row, layout, read_feedback(row))


def read_answers(row: Row, layout: Layout | None = None, feedback: Feedback | None = None) -> Record:
    """
    Read the answers of a row that has been checked, or is not to be.

    Args:
        row (`dict`):
            Row of a dataset.
        layout ([`Layout`], *optional*):
            Layout of the dataset, by default that of the row.
        feedback ([`Feedback`], *optional*):
            What people said about the answers, by default a forced choice.

    Returns:
        [`Record`]: The record.
    """
    layout = layout or find_layout(row)
    kind = layout.kind
    columns: Sequence[str] = layout.columns
    if feedback is not None:
        ranked = feedback.is_ranking
    else:
        # A prepared dataset has the ids of ranked answers in a column of their own.
        ranked = is_ranking(row) if kind != "tokenized" else not is_missing(row.get(RANKED_IDS))
        feedback = FORCED_CHOICE
    if ranked:
        (name, kind) = (RANKING[0], kind) if is_missing(row.get(RANKED_IDS)) else (RANKED_IDS, "tokenized")
        answers = as_list(row.get(name)) or []
        columns = (name,) * len(answers)
    else:
        answers = [row.get(name) for name in columns]
    if kind == "tokenized":
        answers = list(map(as_list, answers))
    prompt = row.get("prompt") if layout.takes_prompt and kind != "tokenized" else None
    return Record(
        comparisons=feedback.comparisons,
        rated=feedback.rated,
        said=feedback.said,
        answers=answers,
        columns=columns,
        kind=kind,
        prompt=None if is_missing(prompt) else prompt,
        template={name: row[name] for name in TEMPLATE_COLUMNS if not is_missing(row.get(name))},
    )


def key_of(sequence: Sequence[int]) -> int:
    """Number at or above 0 of a sequence of token ids, the same for equal ones in all processes."""
    return hash(tuple(sequence)) & (2**63 - 1)  # (Python's hash of integers, and of tuples of them, has no salt.)


def _check_ranking(row: Row) -> None:
    """Raise [`BadRow`] unless there are answers, few enough, and a rank or ratings for each."""
    name = RANKING[0] if is_missing(row.get(RANKED_IDS)) else RANKED_IDS
    judged = [column for column in ("ranks", RANKED_RATINGS) if not is_missing(row.get(column))] or ["ranks"]
    for column, other in ((name, judged[0]), *((column, name) for column in judged)):
        if is_missing(row.get(column)):
            raise BadRow(column, f"missing where {other!r} is given", "give both, or neither")
        if not isinstance(as_list(row[column]), list):
            raise BadRow(column, f"{shown(row[column])} is not a list", "give a list with an entry for each answer")
    answers = as_list(row[name])
    for column in judged:
        given, what = as_list(row[column]), "ranks" if column == "ranks" else "ratings"
        if len(answers) != len(given):
            wrong = f"{len(given)} {what} of {len(answers)} completions"
            fix = "its rank" if column == "ranks" else "its ratings, or null"
            raise BadRow(column, wrong, f"give each completion {fix}")
    _check_number(name, answers)


def _check_number(column: str, values: Any) -> None:
    """Raise [`BadRow`] unless these are the answers, or what is said of each, of a row that fits into a batch."""
    if not isinstance(values, list):
        raise BadRow(column, f"{shown(values)} is not a list", "give a list with an entry for each answer")
    if len(values) < 2:
        raise BadRow(column, "one answer alone cannot be ranked", "drop the row, or give two or more")
    if len(values) > MOST_RANKED:
        wrong = f"{len(values)} answers, whose pairs are too many for a batch"
        raise BadRow(column, wrong, f"give at most {MOST_RANKED}, or cut the ranking into several rows")


def read_feedback(row: Row, with_answers: bool = False) -> Feedback:
    """
    Turn the judgement columns of a row into counts of what was said.

    Args:
        row (`dict`):
            Row of a dataset.
        with_answers (`bool`, *optional*, defaults to `False`):
            Whether to check that ranks have answers to go with. Otherwise the row need not have any.

    Returns:
        [`Feedback`]: Comparisons between answers 0 (`chosen`) and 1 (`rejected`), or of all pairs of ranked answers.

    Raises:
        [`BadRow`]: If something is wrong with the columns.
    """
    if not with_answers and row.keys().isdisjoint(_COLUMNS):
        return FORCED_CHOICE
    said = frozenset(name for name in _COLUMNS if _is_filled(name, row.get(name)))
    strengths = _strengths(row, said)
    wins, losses, ties = _counts(row, said) if strengths is None else _by_sign(strengths)
    # A margin has to be in every row, as in TRL; a weight need not.
    margin = _number(row, "margin", "0.0 for no margin") if "margin" in row else 0.0
    weight = _number(row, "weight", "1.0 for an ordinary row") if "weight" in said else 1.0
    if weight < 0:
        raise BadRow("weight", f"{row['weight']!r} is negative", "give 0 or more; 0 leaves the row out")
    attribute = _name_of(ATTRIBUTE, row[ATTRIBUTE]) if ATTRIBUTE in said else OVERALL
    if with_answers:
        _check_ranking(row)
    if said.isdisjoint(("ranks", RANKED_RATINGS)):
        # Whether a scale of strengths has a 0 is seen in the dataset, not in a row: of a model that has learned no tie
        # width, because no row says 0, the band between the strengths 1 and -1 has no width.
        allowed = "tie" in said or strengths is not None
        graded = tuple(filter(None, strengths or ()))
        comparison = Comparison(0, 1, wins, losses, ties, allowed, margin, weight, graded, attribute)
        rated = _rated(RATINGS, [row.get(name) for name in RATINGS])
        return Feedback(comparisons=(comparison,), rated=rated, said=said)

    of_pairs = [name for name in (*VOTES, "preference_probability", STRENGTH, "tie", *RATINGS) if name in said]
    if of_pairs:
        wrong = "speaks of a chosen and a rejected answer in a row of ranked ones"
        raise BadRow(of_pairs[0], wrong, "put pairs and rankings into different rows")
    rated = {}
    if RANKED_RATINGS in said:
        cells = as_list(row[RANKED_RATINGS])
        _check_number(RANKED_RATINGS, cells)
        rated = _rated([RANKED_RATINGS] * len(cells), cells)
    comparisons = []
    if "ranks" in said:
        _check_number("ranks", as_list(row["ranks"]))
        ranks = [as_number(rank) for rank in as_list(row["ranks"])]
        for position, rank in enumerate(ranks):
            if rank is None:
                wrong = f"{shown(as_list(row['ranks'])[position])} is not a rank"
                raise BadRow("ranks", wrong, "give finite numbers, 1 for the best")
        # A ranking without equal ranks does not tell whether a tie was on offer.
        allowed = len({*ranks}) < len(ranks)
        for better, worse in ranked_pairs(ranks):  # type: ignore[arg-type]
            said_of_pair = (0.0, 0.0, 1.0) if ranks[better] == ranks[worse] else (1.0, 0.0, 0.0)
            comparisons.append(Comparison(better, worse, *said_of_pair, allowed, margin, weight, attribute=attribute))
    else:
        # Nobody compared them. Each stands in a pair, as a batch is made of pairs, the last of an odd number twice.
        starts = [*range(0, len(cells) - 1, 2), *([len(cells) - 2] if len(cells) % 2 else [])]
        comparisons = [Comparison(first, first + 1, 0.0, margin=margin, weight=weight) for first in starts]
    return Feedback(comparisons=comparisons, rated=rated, said=said)


def _is_filled(column: str, cell: Any) -> bool:
    """Whether a cell says something. Arrow has a None for each attribute that is rated in another row."""
    if column in RATINGS:
        return bool(by_attribute(cell, OVERALL))
    if column == RANKED_RATINGS and isinstance(as_list(cell), list):
        return any(by_attribute(of_answer, OVERALL) for of_answer in as_list(cell))
    return not is_missing(cell)


def _rated(columns: Sequence[str], cells: Sequence[Any]) -> Mapping[str, Sequence[list[float | None]]]:
    """Ratings by attribute and answer, from the cells of the answers."""
    rated: dict[str, list[list[float | None]]] = {}
    for answer, (column, cell) in enumerate(zip(columns, cells, strict=True)):
        given = by_attribute(cell, OVERALL)
        for name, ratings in given.items():
            _name_of(column, name)
            for rating in ratings:
                if as_number(rating) is None and not (isinstance(cell, dict) and is_missing(rating)):
                    about = f" of {name!r}" if isinstance(cell, dict) else ""
                    wrong = f"{shown(rating)} is not a rating{about}"
                    raise BadRow(column, wrong, "give a finite number, or a list of them")
            values = [None if is_missing(rating) else rating for rating in ratings]
            rated.setdefault(name, [[] for _ in cells])[answer] = values
        raters = {name: len(ratings) for name, ratings in given.items()}
        if len({*raters.values()}) > 1:
            found = ", ".join(f"{count} of {name!r}" for name, count in raters.items())
            fix = "give each attribute one entry a rater, in the same order, and null where one did not rate it"
            raise BadRow(column, f"ratings of different numbers of raters ({found})", fix)
    return rated


def _name_of(column: str, value: Any) -> str:
    """The name of an attribute."""
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST_NAME:
        wrong = f"{shown(value)} is not the name of an attribute"
        raise BadRow(column, wrong, f"give a text of at most {LONGEST_NAME} characters")
    return value


FORCED_CHOICE = Feedback()
"""What a row says that has none of the columns."""


def _number(row: Row, column: str, example: str) -> float:
    number = as_number(row[column])
    if number is None:
        wrong = f"{shown(row[column])} is not a finite number"
        raise BadRow(column, wrong, f"give every row a number ({example})")
    return float(number)


def _strengths(row: Row, said: frozenset[str]) -> list[int] | None:
    """How much better each person found the chosen side; None if the row does not say."""
    if STRENGTH not in said:
        return None
    strengths = []
    for value in as_ratings(row[STRENGTH]):
        number = as_number(value)
        if number is None or number != int(number) or abs(number) > MOST_LEVELS:
            wrong = f"{shown(value)} is not a strength of preference"
            fix = f"give a whole number from -{MOST_LEVELS} to {MOST_LEVELS}, or a list of them; 0 is a tie"
            raise BadRow(STRENGTH, wrong, fix)
        strengths.append(int(number))
    if others := [name for name in (*VOTES, "preference_probability") if name in said]:
        wrong = f"given together with {others[0]!r}, which says the same thing"
        raise BadRow(STRENGTH, wrong, "remove one of the two from this row")
    if "tie" in said and as_truth(row["tie"]) is not (0 in strengths):
        wrong = f"{shown(row['tie'])} in a row of the strength{'s' * (len(strengths) > 1)} {shown(row[STRENGTH])}"
        raise BadRow("tie", wrong, "remove it from this row: a strength of 0 is a tie")
    return strengths


def _by_sign(strengths: Sequence[int]) -> tuple[float, float, float]:
    """Wins, losses and ties of the chosen side, by the strengths that people gave."""
    won, lost = sum(strength > 0 for strength in strengths), sum(strength < 0 for strength in strengths)
    return float(won), float(lost), float(len(strengths) - won - lost)


def _counts(row: Row, said: frozenset[str]) -> tuple[float, float, float]:
    """Wins, losses and ties of the chosen side."""
    votes = []
    for name in VOTES:
        if name in said:
            number = as_number(row[name])
            if number is None or number < 0 or number != int(number):
                raise BadRow(name, f"{shown(row[name])} is not a number of votes", "give a whole number, 0 or more")
            votes.append(float(number))
    if len(votes) == 1:
        (absent,) = {*VOTES} - said
        raise BadRow(absent, f"missing where {({*VOTES} & said).pop()!r} is given", "give both, or neither")
    probability = None
    if "preference_probability" in said:
        probability = as_number(row["preference_probability"])
        if probability is None or not 0 <= probability <= 1:
            wrong = f"{shown(row['preference_probability'])} is not a probability"
            raise BadRow("preference_probability", wrong, "give P(chosen ≻ rejected), from 0 to 1")
        if votes:
            wrong = "given together with votes, which say the same thing"
            raise BadRow("preference_probability", wrong, "remove one of the two from this row")
        probability = float(probability)
    tie = as_truth(row["tie"]) if "tie" in said else False
    if tie is None:
        wrong = f"{shown(row['tie'])} is not true or false"
        raise BadRow("tie", wrong, "give true, false, or nothing for a forced choice")
    if tie:
        if any(votes):
            wrong = "true in a row with votes for either side"
            raise BadRow("tie", wrong, "give the tied votes a row of their own, with a weight")
        if probability is not None:
            raise BadRow("tie", "true in a row with a soft label", "remove one of the two from this row")
        return 0.0, 0.0, 1.0
    if votes:
        return votes[0], votes[1], 0.0
    return (1.0, 0.0, 0.0) if probability is None else (probability, 1 - probability, 0.0)


def ranked_pairs(ranks: Sequence[float]) -> list[tuple[int, int]]:
    """All pairs of ranked answers, by position, the better one first; of equal ones the one that stands first."""
    return [(a, b) if ranks[a] <= ranks[b] else (b, a) for a, b in combinations(range(len(ranks)), 2)]
