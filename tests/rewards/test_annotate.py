"""`disco-trl score` and `DiscoReward.map`: the numbers, every dataset type, what is refused, and the files."""

import gzip
import json
import math
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from command_line import refusal
from datasets import Dataset, load_dataset
from tiny_models import load
from tiny_training import TOOL, preferences
from transformers import AutoModelForSequenceClassification

from disco_trl import DiscoReward
from disco_trl.cli.main import main
from disco_trl.rewards.annotate import Annotator, annotate_file


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return load_dataset("parquet", data_files=str(path), split="train").to_list()


def by_hand(path: str, sequences: list[list[int]]) -> tuple[list[float], list[float]]:
    """Location and scale of token sequences, each by itself."""
    model = load(path)
    with torch.no_grad():
        rewards = [model.reward_distribution(input_ids=torch.tensor([ids])) for ids in sequences]
    return [reward.location.item() for reward in rewards], [reward.scale.item() for reward in rewards]


USER = [{"role": "user", "content": "How is the film?"}]
GOOD, BAD = [{"role": "assistant", "content": "Good."}], [{"role": "assistant", "content": "Bad, all of it."}]
TYPES = {
    "preference": {"prompt": "How? ", "chosen": "Good.", "rejected": "Bad, all of it."},
    "preference, implicit prompt": {"chosen": "How? Good.", "rejected": "How? Bad."},
    "preference, conversational": {"prompt": USER, "chosen": GOOD, "rejected": BAD},
    "preference, conversational, implicit prompt": {"chosen": USER + GOOD, "rejected": USER + BAD},
    "preference with tools": {"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": [TOOL]},
    "preference with tools as JSON": {"prompt": USER, "chosen": GOOD, "rejected": BAD, "tools": json.dumps([TOOL])},
    "tokenized": {"chosen_ids": [5, 6, 7, 2], "rejected_ids": [5, 8, 2]},
    "tokenized, as TRL once named it": {"chosen_input_ids": [5, 6, 7, 2], "rejected_input_ids": [5, 8, 2]},
    "prompt-completion": {"prompt": "How? ", "completion": "Good."},
    "prompt-completion, conversational": {"prompt": USER, "completion": GOOD},
    "unpaired preference": {"prompt": "How? ", "completion": "Good.", "label": True},
    "unpaired preference, conversational": {"prompt": USER, "completion": GOOD, "label": False},
    "language modeling": {"text": "How? Good."},
    "language modeling, conversational": {"messages": USER + GOOD},
}


def expected_sequences(row: dict, tokenizer) -> list[list[int]]:
    """Written out once more, type by type."""

    def ids(content):
        if isinstance(content, str):
            return tokenizer(content + "<|im_end|>")["input_ids"]
        tools = [TOOL] if "tools" in row else None
        return tokenizer.apply_chat_template(content, tools=tools, tokenize=True, return_dict=True)["input_ids"]

    if "messages" in row or "text" in row:
        return [ids(row.get("messages") or row["text"])]
    if "completion" in row:
        return [ids(row["prompt"] + row["completion"])]
    if "chosen" in row:
        prompt = row.get("prompt") or row["chosen"][:0]
        return [ids(prompt + row["chosen"]), ids(prompt + row["rejected"])]
    return [row[name] for name in row]


@pytest.mark.parametrize("name", TYPES)
def test_every_dataset_type(name, reward_dir, tiny_tokenizer):
    row = TYPES[name]
    locations, scales = by_hand(reward_dir(), expected_sequences(row, tiny_tokenizer))
    dataset = Dataset.from_list([row] * 3)
    reward = DiscoReward(reward_dir(), transform="lower_bound", k=2.0, device="cpu")
    scored = reward.map(dataset)
    assert scored.remove_columns([c for c in scored.column_names if c not in row]).to_list() == dataset.to_list()

    lower = [location - 2 * scale for location, scale in zip(locations, scales, strict=True)]
    suffixes = ["_chosen", "_rejected"] if len(locations) == 2 else [""]
    expected = {}
    for kind, values in (("location", locations), ("scale", scales), ("reward_lower_bound", lower)):
        expected |= {kind + suffix: value for suffix, value in zip(suffixes, values, strict=True)}
    if len(locations) == 2:
        assert locations[0] != locations[1]
        z = (locations[0] - locations[1]) / (scales[0] ** 2 + scales[1] ** 2) ** 0.5
        expected["prob_chosen"] = torch.special.ndtr(torch.tensor(z)).item()
    for got in scored:
        assert {name: got[name] for name in got if name not in row} == pytest.approx(expected, abs=1e-5)

    # A stream gives the same, row by row as it is read.
    assert list(reward.map(dataset.to_iterable_dataset())) == scored.to_list()


# Refusals, with the row, the column and the fix


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "How?"}], r"row 0: no column holds answers \(there are 'prompt'\); a prompt alone has no answer"),
        (
            [{"prompt": "How?", "completions": ["a", "b"], "labels": [True, False]}],
            r"join the steps of each row into one column 'completion'",
        ),
        ([{"prompt": "How?", "candidates": ["a", "b"]}], r"use `disco-trl best-of-n`"),
        ([{"question": "How?", "answer": "So."}], r"rename the columns to 'chosen' and 'rejected'"),
        (
            [TYPES["preference"], {"prompt": "a", "chosen": None, "rejected": "b"}],
            r"row 1, column 'chosen': None; drop",
        ),
        ([TYPES["prompt-completion"], {"prompt": "a", "completion": ""}], r"row 1, column 'completion': an empty"),
        ([{"text": "a"}, {"text": " "}], r"row 1, column 'text': an empty string; drop the row or fill in"),
        (
            [{"messages": USER + GOOD}, {"messages": USER}],
            r"row 1, column 'messages': no assistant turn, .* end it with",
        ),
        (
            [{"prompt": USER, "completion": GOOD}, {"prompt": USER, "completion": USER}],
            r"row 1, column 'completion': no assistant turn",
        ),
        ([{"chosen_ids": [1], "rejected_ids": [2]}, {"chosen_ids": [1], "rejected_ids": []}], r"row 1, .*: no tokens"),
        ([{"text": "a", "scale": 1.0}], r"column 'scale': the data has one of this name already"),
    ],
)
def test_what_cannot_be_scored(rows, message, reward_dir, tmp_path):
    reward = DiscoReward(reward_dir(), device="cpu")
    with pytest.raises(ValueError, match=message):
        reward.map(Dataset.from_list(rows))
    with pytest.raises(ValueError, match=message):
        list(reward.map(Dataset.from_list(rows).to_iterable_dataset()))
    with pytest.raises(SystemExit, match=message):
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        main(["score", reward_dir(), data, str(tmp_path / "scored.jsonl"), "--device", "cpu"])
    assert not (tmp_path / "scored.jsonl").exists()


def test_a_prefix_mends_a_clash(reward_dir):
    reward = DiscoReward(reward_dir(), device="cpu")
    twice = reward.map(reward.map(Dataset.from_list([{"text": "a"}])), prefix="again_")
    assert twice[0]["again_location"] == twice[0]["location"]


def test_win_rate_is_refused(reward_dir):
    with pytest.raises(
        ValueError, match=r"'win_rate' compares all the answers to one prompt.*use `disco-trl best-of-n`"
    ):
        DiscoReward(reward_dir(), transform="win_rate", device="cpu").map(Dataset.from_list([{"text": "a"}]))


def test_what_has_no_reward_is_refused(tiny_llama_dir, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    with pytest.raises(SystemExit, match=r"disco-trl score: .* without a reward head: its rewards"):
        main(["score", tiny_llama_dir, data, str(tmp_path / "scored.jsonl"), "--device", "cpu"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scored.csv"], r"--output_file scored\.csv: its name must end in \.parquet or \.jsonl"),
        (["rows.jsonl"], r"--output_file rows\.jsonl exists already; delete it"),
        (["o.jsonl", "--rows_per_part", "0"], r"--rows_per_part 0 must be at least 1"),
        (["o.jsonl", "--tokens_per_batch", "0"], r"--tokens_per_batch 0 must be at least 1"),
        (["o.jsonl", "--k", "1"], r"transform 'mean' has no option 'k'"),
        (["o.jsonl", "--transform", "quantile", "--q", "1"], r"'quantile': q=1\.0 must be a number strictly"),
        (["o.jsonl", "--dataset_split", "test"], r"--dataset_split: the dataset has no split 'test'; it has 'train'"),
    ],
)
def test_arguments_that_are_wrong(arguments, message, reward_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert re.search(message, refusal(capsys, "score", reward_dir(), "rows.jsonl", *arguments, "--device", "cpu"))
    with pytest.raises(SystemExit, match=r"--dataset_name missing\.jsonl: there is no such file"):
        main(["score", reward_dir(), "missing.jsonl", "o.jsonl", "--device", "cpu"])


def test_a_scalar_reward_model_is_read_as_bradley_terry(tiny_llama_dir, tiny_tokenizer, tmp_path, caplog):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "scalar")
    tiny_tokenizer.save_pretrained(tmp_path / "scalar")
    data = write_jsonl(tmp_path / "rows.jsonl", [TYPES["preference"]])
    out = tmp_path / "scored.jsonl"
    main(["score", str(tmp_path / "scalar"), data, str(out), "--device", "cpu"])
    [row] = read(out)
    assert row["scale_chosen"] == row["scale_rejected"] == pytest.approx(0.5**0.5)
    difference = torch.tensor(row["location_chosen"] - row["location_rejected"])
    assert abs(difference) > 0.01
    assert row["prob_chosen"] == pytest.approx(torch.sigmoid(difference).item(), abs=1e-6)
    assert "is read as Bradley–Terry" in caplog.text


# The command


def test_inputs_and_outputs_agree(reward_dir, tmp_path):
    tool = {"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    rows = [
        {**row, "tools": [tool], "id": number, "note": None}
        for number, row in enumerate(preferences("conversational", rows=21))
    ]
    dataset = Dataset.from_list(rows)
    sources = {
        "a.jsonl": write_jsonl(tmp_path / "a.jsonl", rows),
        "a.jsonl.gz": str(tmp_path / "a.jsonl.gz"),
        "a.parquet": str(tmp_path / "a.parquet"),
        "folder": str(tmp_path / "folder"),
    }
    with gzip.open(sources["a.jsonl.gz"], "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    dataset.to_parquet(sources["a.parquet"])
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", rows)
    write_jsonl(tmp_path / "folder" / "test.jsonl", rows[:3])

    expected = DiscoReward(reward_dir(), device="cpu").map(dataset).to_list()
    for number, (name, source) in enumerate(sources.items()):
        for suffix in (".parquet", ".jsonl"):
            out = tmp_path / "out" / f"{number}{suffix}"
            split = ["--dataset_split", "train"] if name == "folder" else []
            main(["score", reward_dir(), source, str(out), "--rows_per_part", "8", "--device", "cpu", *split])
            got = read(out)
            assert [row["id"] for row in got] == list(range(21))
            for row, wanted in zip(got, expected, strict=True):
                # The batches are others, so the numbers agree to rounding.
                assert {key: row[key] for key in rows[0]} == {key: wanted[key] for key in rows[0]}
                scores = {key: wanted[key] for key in wanted if key not in rows[0]}
                assert {key: row[key] for key in row if key not in rows[0]} == pytest.approx(scores, abs=1e-5)
            assert [path.name for path in out.parent.glob(f"{number}{suffix}*")] == [out.name]
    assert pq.read_schema(tmp_path / "out" / "0.parquet").field("location_chosen").type == "float"
    with pytest.raises(SystemExit, match=r"has the splits 'train', 'test'; choose one with --dataset_split"):
        main(["score", reward_dir(), sources["folder"], str(tmp_path / "o.jsonl"), "--device", "cpu"])


def test_what_parquet_has_no_type_for_is_known_before_scoring(reward_dir, tmp_path):
    dataset = Dataset.from_list([{"text": "a", "note": {}}])
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))
    with pytest.raises(ValueError, match=r"struct type 'note' with no child field .* write to a \.jsonl file instead"):
        annotate_file(dataset, tmp_path / "scored.parquet", annotator)
    dataset = Dataset.from_dict({"text": ["a", "b"], "note": [1.0, math.nan]})
    with pytest.raises(ValueError, match=r"row 1: .* write to a \.parquet file"):
        annotate_file(dataset, tmp_path / "scored.jsonl", annotator)
    assert not list(tmp_path.iterdir())


def test_csv_whose_column_changes_its_type(reward_dir, tmp_path):
    # A CSV file has no types: the first 256 rows look like integers.
    lines = [f"text {number},{number}" for number in range(300)] + ["the last,2.5"]
    (tmp_path / "a.csv").write_text("\n".join(["text,n", *lines]) + "\n")
    out = tmp_path / "scored.parquet"
    main(["score", reward_dir(), str(tmp_path / "a.csv"), str(out), "--device", "cpu"])
    assert [row["n"] for row in read(out)] == [*map(float, range(300)), 2.5]


def test_sample_does_not_depend_on_what_was_scored_before(reward_dir, tmp_path):
    # Twelve times the same pair, so that equal rewards would be equal draws.
    data = write_jsonl(tmp_path / "a.jsonl", [TYPES["preference"]] * 12)
    arguments = ["--device", "cpu", "--rows_per_part", "4", "--transform", "sample"]
    outs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    for out, seed in zip(outs, "112", strict=True):
        main(["score", reward_dir(), data, str(out), *arguments, "--seed", seed])
    first, same, other = ([row["reward_sample_chosen"] for row in read(out)] for out in outs)
    assert first == same
    assert len({*first, *other}) == 24


def test_the_documented_columns_are_the_columns(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [TYPES["preference"]])
    out = tmp_path / "scored.jsonl"
    main(["score", reward_dir(), data, str(out), "--device", "cpu", "--transform", "lower_bound"])
    [row] = read(out)
    documented = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
    for name in row.keys() - TYPES["preference"].keys():
        assert re.search(rf"`{name}`", documented), name
