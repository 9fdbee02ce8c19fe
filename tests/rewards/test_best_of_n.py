"""`disco-trl best-of-n`: the answer with the highest reward, whatever the transform, and what it writes beside it."""

import json

import pytest
from datasets import load_dataset
from tiny_training import TOOL

from disco_trl import DiscoReward, best_of_n
from disco_trl.cli.main import main


ANSWERS = ["Good.", "Bad, all of it.", "The film is short and careful.", "Not at all."]
ROWS = [{"id": n, "prompt": f"How is film {n}? ", "candidates": ANSWERS[n % 2 :]} for n in range(5)]


def messages(role, text):
    return [{"role": role, "content": text}]


CHAT_ROWS = [
    {
        "prompt": messages("user", row["prompt"]),
        "candidates": [messages("assistant", answer) for answer in row["candidates"]],
        "tools": [TOOL],
    }
    for row in ROWS
]


def command(tmp_path, rows, model, *arguments, out="best.jsonl"):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["best-of-n", model, str(tmp_path / "rows.jsonl"), str(tmp_path / out), "--device", "cpu", *arguments])
    kind = "json" if out.endswith("jsonl") else "parquet"
    return load_dataset(kind, data_files=str(tmp_path / out), split="train").to_list()


@pytest.mark.parametrize("out", ["best.jsonl", "best.parquet"])
@pytest.mark.parametrize("rows", [ROWS, CHAT_ROWS], ids=["text", "messages with tools"])
def test_the_best_answer(rows, out, reward_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("disco_trl.cli.best_of_n.ROWS_AT_ONCE", 2)
    got = command(tmp_path, rows, reward_dir(), "--transform", "lower_bound", "--k", "2", out=out)
    assert [{name: row[name] for name in rows[0]} for row in got] == rows
    reward = DiscoReward(reward_dir(), device="cpu")
    for row, best in zip(rows, got, strict=True):
        count = len(row["candidates"])
        columns = {"tools": [row["tools"]] * count} if "tools" in row else {}
        expected = reward.distribution([row["prompt"]] * count, row["candidates"], **columns)
        assert best["locations"] == pytest.approx(expected.location.tolist(), abs=1e-5)
        assert best["scales"] == pytest.approx(expected.scale.tolist(), abs=1e-5)
        rewards = (expected.location - 2 * expected.scale).tolist()
        assert best["rewards"] == pytest.approx(rewards, abs=1e-5)
        assert best["best_index"] == rewards.index(max(rewards))
        assert best["best"] == row["candidates"][best["best_index"]]


def test_tools_matter_to_the_function_too(reward_dir):
    arguments = {"model": DiscoReward(reward_dir(), device="cpu").model, "transform": "mean"}
    prompts, candidates = [CHAT_ROWS[0]["prompt"]], [CHAT_ROWS[0]["candidates"]]
    [without] = best_of_n(prompts, candidates, **arguments)
    [with_tools] = best_of_n(prompts, candidates, columns={"tools": [[TOOL]]}, **arguments)
    assert (with_tools.distribution.location - without.distribution.location).abs().min() > 1e-4


def test_win_rates_are_within_each_prompt(reward_dir, tmp_path):
    for row in command(tmp_path, ROWS, reward_dir(), "--transform", "win_rate"):
        assert sum(row["rewards"]) / len(row["rewards"]) == pytest.approx(0.5, abs=1e-6)
        assert row["best_index"] == row["rewards"].index(max(row["rewards"]))


def test_draws_are_reproducible_and_go_on(reward_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("disco_trl.cli.best_of_n.ROWS_AT_ONCE", 1)
    same = [{"prompt": "How? ", "candidates": ANSWERS}] * 3
    arguments = [reward_dir(), "--transform", "sample", "--seed", "4"]
    first = [row["rewards"] for row in command(tmp_path, same, *arguments, out="1.jsonl")]
    again = [row["rewards"] for row in command(tmp_path, same, *arguments, out="2.jsonl")]
    assert first == again
    assert len({tuple(rewards) for rewards in first}) == 3


def test_columns_by_other_names(reward_dir, tmp_path):
    rows = [{"question": row["prompt"], "answers": row["candidates"]} for row in ROWS]
    names = ["--prompt_column", "question", "--candidates_column", "answers"]
    got = command(tmp_path, rows, reward_dir(), *names)
    assert [row["best"] in row["answers"] for row in got] == [True] * 5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a"}],
            r"column 'candidates': missing \(there are 'prompt'\); name the columns with --prompt_column",
        ),
        ([ROWS[0], ROWS[1] | {"candidates": []}], r"row 1, column 'candidates': a list of at least one answer"),
        ([ROWS[0], ROWS[1] | {"candidates": None}], r"row 1, column 'candidates': a list of at least one answer"),
        ([ROWS[0], ROWS[1] | {"candidates": ["a", None]}], r"row 1, column 'candidates': answer 1 is a NoneType"),
        ([ROWS[0], ROWS[1] | {"prompt": None}], r"row 1, column 'prompt': None is no text or list of messages"),
        ([ROWS[0] | {"best": "a"}], r"column 'best': the data has one of this name already"),
    ],
)
def test_rows_that_are_wrong(rows, message, reward_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("disco_trl.cli.best_of_n.ROWS_AT_ONCE", 1)
    with pytest.raises(SystemExit, match=message):
        command(tmp_path, rows, reward_dir())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
