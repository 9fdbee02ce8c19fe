"""`disco-trl score` and `DiscoReward.map`: the numbers, every dataset type, kills, several processes, memory."""

import contextlib
import gc
import gzip
import json
import math
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from command_line import refusal
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from safetensors.torch import load_file, save_file
from tiny_models import load
from tiny_training import TOOL, preferences
from transformers import AutoModelForSequenceClassification

from disco_trl import DiscoReward
from disco_trl.cli.main import main
from disco_trl.data.files import chunks
from disco_trl.distributions.transforms import get_transform
from disco_trl.rewards.annotate import Annotator, annotate_file


def write_jsonl(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return load_dataset("parquet", data_files=str(path), split="train").to_list()


def run(arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "disco_trl", "score", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **options)


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


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


# Kills


class Killed(BaseException):
    """Nothing may catch it."""


def broken_off(dataset, out, annotator, monkeypatch, after: int) -> None:
    """Score until `after` parts are there."""
    whole = Annotator.__call__

    def limited(self, rows, answers, first=0):
        if len(list(out.parent.glob(f"{out.name}.parts/part-*.parquet"))) == after:
            raise Killed
        return whole(self, rows, answers, first)

    with monkeypatch.context() as patch:
        patch.setattr(Annotator, "__call__", limited)
        with pytest.raises(Killed):
            annotate_file(dataset, out, annotator, rows_per_part=4)


def test_what_must_not_change_before_it_goes_on(reward_dir, tiny_tokenizer, tmp_path, monkeypatch):
    rows = preferences(rows=12).to_list()
    out = tmp_path / "scored.jsonl"
    reward = DiscoReward(reward_dir(), device="cpu")
    broken_off(Dataset.from_list(rows), out, Annotator(reward), monkeypatch, after=2)

    def refused(what, dataset_rows, annotator, rows_per_part=4):
        with pytest.raises(ValueError, match=rf"with other settings \(then {what} .* delete the folder"):
            annotate_file(Dataset.from_list(dataset_rows), out, annotator, rows_per_part)

    refused("data", [*rows[:-1], {**rows[-1], "chosen": "Something else."}], Annotator(reward))
    refused("data", [*reversed(rows)], Annotator(reward))
    refused("rows", rows[:-1], Annotator(reward))
    refused("transform", rows, Annotator(reward, get_transform("lower_bound")))
    refused("prefix", rows, Annotator(reward, prefix="my_"))
    refused("rows_per_part", rows, Annotator(reward), rows_per_part=5)
    refused("family", rows, Annotator(DiscoReward(reward_dir(reward_family="cauchy"), device="cpu")))

    edited = tmp_path / "edited"
    edited.mkdir()
    for file in Path(reward_dir()).iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    weights = load_file(edited / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, edited / "model.safetensors", metadata={"format": "pt"})
    refused("model", rows, Annotator(DiscoReward(str(edited), device="cpu")))
    tiny_tokenizer.chat_template += " "
    refused("tokenizer", rows, Annotator(DiscoReward(reward_dir(), tiny_tokenizer, device="cpu")))

    # The same model from another place is the same model.
    other_copy = Annotator(DiscoReward(load(reward_dir()), reward.processing_class))
    assert annotate_file(Dataset.from_list(rows), out, other_copy, 4) == (12, 8)


def test_the_same_result_however_often_it_is_broken_off(reward_dir, tmp_path, monkeypatch):
    dataset = preferences(rows=22)
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"), get_transform("sample", seed=5))
    whole, pieced = tmp_path / "whole.parquet", tmp_path / "pieced.parquet"
    assert annotate_file(dataset, whole, annotator, rows_per_part=4) == (22, 0)
    for after in (0, 1, 2, 5):
        broken_off(dataset, pieced, annotator, monkeypatch, after)
        assert not pieced.exists()
    # Half a part, and half of the file, are what a kill leaves.
    (tmp_path / "pieced.parquet.parts" / "part-000005.unfinished").write_bytes(b"PAR1")
    (tmp_path / "pieced.parquet.unfinished").write_bytes(b"PAR1")
    assert annotate_file(dataset, pieced, annotator, rows_per_part=4) == (22, 20)
    assert pieced.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieced.parquet", "whole.parquet"]


@pytest.mark.slow
def test_kill_9(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", preferences("conversational", rows=200))
    out, parts = tmp_path / "scored.parquet", tmp_path / "scored.parquet.parts"
    arguments = [reward_dir(), data, out, "--rows_per_part", "2", "--device", "cpu"]
    command = [sys.executable, "-m", "disco_trl", "score", *map(str, arguments)]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=environment(), stderr=log) as process:
        while len(list(parts.glob("part-*.parquet"))) < 5:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.01)
                break
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not out.exists()
    before = {path.name: path.stat() for path in parts.glob("part-*.parquet")}
    assert 5 <= len(before) < 100

    # A hard link keeps each finished part in sight after the command has tidied up.
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in before:
        os.link(parts / name, kept / name)
    finished = run(arguments)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"{out}: 200 rows, {2 * len(before)} of them scored before" in finished.stdout
    for name, stat in before.items():
        now = (kept / name).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_size) == (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    assert not parts.exists()

    main(["score", reward_dir(), data, str(tmp_path / "whole.parquet"), *arguments[3:]])
    assert read(out) == read(tmp_path / "whole.parquet")


def test_killed_while_it_tidied_up(reward_dir, tmp_path, capsys):
    data = write_jsonl(tmp_path / "a.jsonl", preferences(rows=4))
    out, parts = tmp_path / "scored.jsonl", tmp_path / "scored.jsonl.parts"
    arguments = ["score", reward_dir(), data, str(out), "--device", "cpu"]
    main(arguments)
    complete = out.read_text()
    parts.mkdir()
    (parts / "settings.json").write_text("{}")
    (parts / "part-000000.parquet").write_text("")
    main(arguments)
    assert "was complete" in capsys.readouterr().out
    assert out.read_text() == complete
    assert not parts.exists()


# Several processes


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_give_what_one_gives(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", preferences("conversational", rows=50))
    arguments = ["--rows_per_part", "4", "--device", "cpu", "--transform", "sample"]
    # accelerate's name for "several processes on this machine"; `--device cpu` has them meet over gloo.
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two, log = tmp_path / "two.parquet", tmp_path / "log"
    result = subprocess.run(
        [*launcher, __file__, str(log), "score", reward_dir(), data, str(two), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("50 rows") == 1
    # Each part once, and the two processes by turns.
    lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert sorted(lines, key=lambda line: line[1]) == [(part % 2, part * 4) for part in range(13)]
    log.unlink()
    main(["score", reward_dir(), data, str(tmp_path / "one.parquet"), *arguments])
    assert read(two) == read(tmp_path / "one.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "one.parquet", "two.parquet"]


# Memory


def test_memory_does_not_grow_with_the_rows(reward_dir, tmp_path):
    annotator = Annotator(DiscoReward(reward_dir(), device="cpu"))

    def peak(rows: int, out: Path) -> float:
        """MiB at most, in Python and in Arrow, above what there was before; a row is 100 KB, and a part 8 rows."""
        import pyarrow as pa

        arrow = [pa.total_allocated_bytes()]

        def make():
            for number in range(rows):
                arrow.append(pa.total_allocated_bytes())
                yield {"text": f"Film {number}.", "note": f"{number:07d} " * 12_500}

        features = Features({"text": Value("string"), "note": Value("string")})
        dataset = IterableDataset.from_generator(make, features=features)
        gc.collect()
        tracemalloc.start()
        annotate_file(dataset, out, annotator, rows_per_part=8)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (python + max(arrow) - arrow[0]) / 2**20

    # 100 rows are 10 MiB, 800 rows 76, and a part is 0.8.
    few, many = peak(100, tmp_path / "few.jsonl"), peak(800, tmp_path / "many.jsonl")
    assert many < few + 1
    assert many < 5


def test_chunks_read_no_further_than_they_must():
    taken = []

    def make():
        for number in range(10):
            taken.append(number)
            yield {"text": str(number)}

    read_chunks = chunks(IterableDataset.from_generator(make), 4)
    assert [row["text"] for row in next(read_chunks)] == ["0", "1", "2", "3"]
    assert len(taken) <= 5
    assert [len(rows) for rows in read_chunks] == [4, 2]


def test_the_documented_columns_are_the_columns(reward_dir, tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [TYPES["preference"]])
    out = tmp_path / "scored.jsonl"
    main(["score", reward_dir(), data, str(out), "--device", "cpu", "--transform", "lower_bound"])
    [row] = read(out)
    documented = (Path(__file__).parents[2] / "docs" / "scoring.md").read_text()
    for name in row.keys() - TYPES["preference"].keys():
        assert re.search(rf"`{name}`", documented), name


def log_what_is_scored(log: Path) -> None:
    """Have each process write a line for each part that it scores: its own number, and that of the first row."""
    whole = Annotator.__call__

    def logged(self, rows, answers, first=0):
        with log.open("a") as file:
            file.write(f"{PartialState().process_index} {first}\n")
        return whole(self, rows, answers, first)

    Annotator.__call__ = logged  # type: ignore[method-assign]


if __name__ == "__main__":
    log_what_is_scored(Path(sys.argv[1]))
    main(sys.argv[2:])
