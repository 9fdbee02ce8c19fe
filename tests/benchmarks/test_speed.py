"""`benchmarks/speed.py`: each command to the end on a tiny model, and what it counts against numbers worked out here.

No time is asserted.
"""

import argparse
import json
import statistics
import warnings
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, enable_progress_bars
from peft import LoraConfig, get_peft_model
from tiny_training import preferences
from transformers import AutoTokenizer
from transformers.utils import logging

from benchmarks import speed, speed_dpo, speed_parts, speed_train
from benchmarks.peak_memory import PeakMemory, in_fresh_process
from benchmarks.speed_counts import (
    PairLengths,
    attention_flops,
    choose_batches,
    load_pairs,
    matmul_flops_per_token,
    peak_flops,
    synthetic_pairs,
)
from benchmarks.speed_report import markdown, spread
from disco_trl import DiscoRewardModel


# Prompt 1 2 3, then 2 and 4 tokens; prompt 7, then 1 and 3 tokens.
PAIRS = [([1, 2, 3, 4, 5], [1, 2, 3, 6, 5, 4, 4]), ([7, 8], [7, 9, 9, 9])]


@pytest.fixture(autouse=True)
def loud_again():
    """The script silences libraries for its progress bar; the next tests may want to hear them."""
    verbosity = logging.get_verbosity()
    with warnings.catch_warnings():
        yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    enable_progress_bars()


# Counts


def test_tokens_of_pairs():
    lengths = PairLengths.of(PAIRS)
    assert lengths.unique == (3 + 2 + 4) + (1 + 1 + 3)
    assert lengths.repeated == 3 + 1
    assert lengths.padded == 4 * 7  # 4 sides, as long as the longest
    assert lengths[[1]].unique == 5
    assert lengths[[1]].padded == 2 * 4


def test_the_chosen_batches_stand_for_the_epoch():
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 100, 400)
    lengths = PairLengths(prompt + rng.integers(1, 50, 400), prompt + rng.integers(1, 50, 400), prompt)
    batches = rng.permutation(400).reshape(50, 8).tolist()
    chosen = choose_batches(batches, lengths, 4, seed=0)
    assert chosen == choose_batches(batches, lengths, 4, seed=0)
    assert len({tuple(batch) for batch in chosen}) == 4
    sample = lengths[list(chain(*chosen))]
    assert sample.unique / 32 == pytest.approx(lengths.unique / 400, rel=0.02)
    padded = sum(lengths[batch].padded for batch in chosen) / 32
    assert padded == pytest.approx(sum(lengths[batch].padded for batch in batches) / 400, rel=0.02)
    with pytest.raises(ValueError, match="an epoch has 50 full batches, fewer than the 51"):
        choose_batches(batches, lengths, 51, seed=0)


def test_synthetic_pairs_are_what_was_asked_for(tiny_tokenizer):
    pairs = synthetic_pairs(4, 80, 0.75, tiny_tokenizer, seed=0)
    lengths = PairLengths.of(pairs)
    # Between a half and one and a half of 80, a fifth apart.
    assert lengths.chosen.tolist() == lengths.rejected.tolist() == [56, 72, 88, 104]
    assert lengths.shared.tolist() == [42, 54, 66, 78]
    specials = set(tiny_tokenizer.all_special_ids)
    assert not specials.intersection(token for pair in pairs for side in pair for token in side)
    assert PairLengths.of(synthetic_pairs(50, 64, 0.0, tiny_tokenizer, seed=0)).repeated == 0
    assert pairs != synthetic_pairs(4, 80, 0.75, tiny_tokenizer, seed=1)


def test_pairs_too_long_or_without_a_difference_are_left_out(tiny_tokenizer, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [("a", "b"), ("a", "a"), ("a " * 30, "b")]
    file.write_text("".join(json.dumps({"prompt": "c ", "chosen": x, "rejected": y}) + "\n" for x, y in rows))
    assert len(load_pairs(str(file), "train", tiny_tokenizer, max_length=20)) == 1
    assert len(load_pairs(str(file), "train", tiny_tokenizer, max_length=None)) == 2


# Floating-point operations


def test_flops_of_weight_matrices(base_model_dir):
    model = DiscoRewardModel.from_pretrained(base_model_dir("llama"))
    # Width 64, 4 heads of 16, 2 of them for keys and values; 128 within the MLP; 2 layers.
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert matmul_flops_per_token(model) == 6 * weights

    # LoRA of rank 2: for each matrix, 2 rows as wide as its input and 2 columns as high as its output.
    adapters = 2 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")
    assert matmul_flops_per_token(get_peft_model(model, config)) == 4 * weights + 6 * adapters


def test_flops_of_weight_matrices_of_gpt2(base_model_dir):
    # Its layers are no `nn.Linear`, and its positions are looked up.
    model = DiscoRewardModel.from_pretrained(base_model_dir("gpt2"))
    assert matmul_flops_per_token(model) == 6 * 2 * (64 * 192 + 64 * 64 + 2 * 64 * 256)


def test_flops_of_attention(base_model_dir):
    config = DiscoRewardModel.from_pretrained(base_model_dir("llama")).config
    # Keys that the tokens of each pair see: 1 + 2 + 3 in the prompt, then 4 + 5 in one answer and 4 to 7 in the other.
    keys = (6 + 9 + 22) + (1 + 2 + (2 + 3 + 4))
    assert attention_flops(config, PairLengths.of(PAIRS)) == 12 * 2 * (4 * 16) * keys

    # The same with a window of 3 in one of the two layers.
    windowed = SimpleNamespace(
        num_attention_heads=4,
        head_dim=16,
        num_hidden_layers=2,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    )
    windowed.get_text_config = lambda: windowed
    keys_in_window = (6 + 2 * 3 + 4 * 3) + (1 + 2 + (2 + 3 + 3))
    assert attention_flops(windowed, PairLengths.of(PAIRS)) == 12 * (4 * 16) * (keys + keys_in_window)


def test_flops_that_a_device_could_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12, "NVIDIA A10G": 70e12}
    for name, flops in {**names, "Unheard Of 1": None}.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops("bfloat16") == flops
        assert peak_flops("float32") is None


# Training


@pytest.fixture
def pairs_file(tmp_path):
    file = tmp_path / "pairs.jsonl"
    preferences("conversational", rows=40).to_json(file)
    return str(file)


def run(*arguments: str, out: Path) -> dict:
    """Run a command, and check that it leaves a table, figures and, unless it is `head`, a picture."""
    kind = speed.KINDS_OF_SWEEP[arguments[0]] if arguments[1] == "--sweep" else arguments[0]
    speed.main([*arguments, "--out", str(out), "--rounds", "2"])
    assert (out / f"{kind}.md").read_text().startswith("| ")
    if kind != "head":
        assert (out / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{kind}.json").read_text())


@pytest.fixture
def in_this_process(monkeypatch):
    """Nothing is run in a process of its own, which only matters to the figures of memory, and to other tests."""
    for module in (speed_train, speed_parts, speed_dpo):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *arguments: function(*arguments))
    yield
    datasets.enable_caching()


@pytest.mark.slow
def test_train(tiny_llama_dir, pairs_file, tmp_path, in_this_process):
    options = ("--dtype", "float32", "--batch-size", "4", "--steps", "2", "--peak-flops", "1e12")
    result = run("train", "--model", tiny_llama_dir, "--dataset", pairs_file, *options, out=tmp_path / "out")
    variants = result["variants"]
    assert list(variants) == list(speed_train.VARIANTS)
    trl = variants["trl"]
    pairs = load_pairs(pairs_file, "train", AutoTokenizer.from_pretrained(tiny_llama_dir), None)
    lengths = PairLengths.of(pairs)
    for name in ("plain", "shared", "default"):
        assert variants[name]["timed_pairs"] == trl["timed_pairs"]
    for name in ("trl", "plain", "trl-grouped", "grouped"):
        timed = variants[name]["timed_pairs"]
        padded = sum(lengths[batch].padded for batch in timed)
        assert variants[name]["processed_per_unique"] == pytest.approx(padded / lengths[list(chain(*timed))].unique)
        repeated = variants[name]["repeated_per_unique_in_epoch"]
        assert repeated == pytest.approx(lengths.repeated / lengths.unique, rel=0.05)  # 40 pairs are 10 full batches
    for name in ("trl-grouped", "grouped"):
        assert variants[name]["processed_per_unique_in_epoch"] < trl["processed_per_unique_in_epoch"]
    for name in ("shared", "default", "budget"):
        # The prompts of a template begin alike, so there may be less than each pair's own; the row is filled up to 64.
        assert variants[name]["repeated_per_unique_in_epoch"] == 0
    for name in ("plain", "shared"):
        assert variants[name]["loss_difference"] < 1e-4
        assert len(variants[name]["losses"]) == 2 * 3
    assert trl["loss_difference"] == 0
    for variant in variants.values():
        assert [len(seconds) for seconds in variant["seconds"]] == [2, 2, 2]
        number = sum(map(len, variant["timed_pairs"]))
        rates = [number / sum(seconds) for seconds in variant["seconds"]]
        assert variant["pairs_per_second"] == pytest.approx(rates[1:])
        assert variant["times_trl"] == pytest.approx(
            [own / other for own, other in zip(rates[1:], trl["pairs_per_second"], strict=True)]
        )
        timed = lengths[list(chain(*variant["timed_pairs"]))]
        # Width 16, 2 heads of 8, 32 within the MLP, 2 layers, all trained.
        flops = 6 * 2 * (4 * 16 * 16 + 3 * 16 * 32) * timed.unique
        for length, sign in ((timed.chosen, 1), (timed.rejected, 1), (timed.shared, -1)):
            flops += sign * int((length * (length + 1) // 2).sum()) * 12 * 2 * 16
        assert variant["utilisation"] == pytest.approx(flops / number * statistics.median(rates[1:]) / 1e12)


def test_batches_of_the_trainers_are_the_same_and_grouping_groups(tiny_llama_dir, tiny_tokenizer):
    pairs = synthetic_pairs(64, 20, 0.5, tiny_tokenizer, seed=0)
    lengths = PairLengths.of(pairs)
    args = settings(tiny_llama_dir)
    batches = {
        name: speed_train.epoch_batches(speed_train.make_trainer(name, pairs, args)) for name in speed_train.VARIANTS
    }
    assert batches["plain"] == batches["shared"] == batches["default"] == batches["trl"]
    padded = {name: sum(lengths[batch].padded for batch in own) for name, own in batches.items()}
    assert max(padded["trl-grouped"], padded["grouped"]) < 0.9 * padded["trl"]
    for name, own in batches.items():
        assert sorted(chain(*own)) == list(range(64)), name
    assert len({len(batch) for batch in batches["budget"]}) > 1


def settings(model: str) -> argparse.Namespace:
    return speed.make_parser().parse_args(
        ["train", "--model", model, "--dtype", "float32", "--batch-size", "4", "--rounds", "1"]
    )


def test_trainers_that_were_given_other_batches_are_found_out(tiny_llama_dir, tiny_tokenizer):
    pairs = synthetic_pairs(8, 12, 0.5, tiny_tokenizer, seed=0)
    batches = {"trl": [[0, 1, 2, 3]], "default": [[4, 5, 6, 7]]}
    with pytest.raises(RuntimeError, match="disco, defaults was not given the batches of TRL, defaults"):
        speed_train.alternate(batches, pairs, settings(tiny_llama_dir), "test")


def test_an_error_in_a_trainers_thread_comes_out(tiny_llama_dir, tiny_tokenizer):
    pairs = synthetic_pairs(4, 12, 0.5, tiny_tokenizer, seed=0)
    trainer = speed_train.make_trainer("trl", pairs, settings(tiny_llama_dir), max_steps=1)
    speed_train.replay(trainer, [[0, 99]])
    with pytest.raises(IndexError):
        speed_train.SteppedTrainer(trainer).step()


def test_other_losses_than_trls_are_refused():
    variant = {"label": "disco, all off", "loss_difference": 2e-3}
    result = {"settings": {"dtype": "float32"}, "variants": {"plain": variant}}
    with pytest.raises(SystemExit, match=r"disco, all off: its losses differ from TRL's by up to 0\.0020"):
        speed.refuse_other_losses(result)
    variant["loss_difference"] = float("nan")
    with pytest.raises(SystemExit):
        speed.refuse_other_losses(result)
    variant["loss_difference"] = 1e-5
    speed.refuse_other_losses(result)


@pytest.mark.slow
def test_dpo(tiny_llama_dir, pairs_file, tmp_path, in_this_process):
    names = ["trl", "plain", "default", "best"]
    options = ("--dtype", "float32", "--batch-size", "4", "--steps", "2", "--lora", "--variants", *names)
    result = run("dpo", "--model", tiny_llama_dir, "--dataset", pairs_file, *options, out=tmp_path / "out")
    variants = result["variants"]
    assert list(variants) == names
    for name in speed_dpo.SAME_LOSS:
        assert variants[name]["loss_difference"] < 1e-4
    assert variants["plain"]["processed_per_unique"] == variants["trl"]["processed_per_unique"] > 1.2
    assert variants["default"]["processed_per_unique"] < variants["plain"]["processed_per_unique"]
    for variant in variants.values():
        assert np.isfinite(variant["peak_bytes"]) and len(variant["times_trl"]) == 2


@pytest.mark.parametrize("command", ["train", "dpo"])
def test_sweep(command, tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(speed_train, "SWEEP", {"prompt share": [0.5, 0.0], "length": [16, 32], "batch size": [2, 4]})
    result = run(command, "--sweep", "--model", tiny_llama_dir, "--dtype", "float32", out=tmp_path)
    points = result["points"]
    assert [(point["axis"], point["value"]) for point in points] == [
        ("prompt share", 0.0),
        ("prompt share", 0.5),
        ("length", 16),
        ("length", 32),
        ("batch size", 2),
        ("batch size", 4),
    ]
    assert points[1]["variants"] == points[2]["variants"]  # the middle is measured once
    for point in points:
        trl, ours = point["variants"]["trl"], point["variants"]["default"]
        assert trl.get("timed_pairs") == ours.get("timed_pairs")
        # Lengths are 1/2 to 3/2 of the mean, of which `place / (pairs + 1)` are between, and TRL pads to the longest.
        tokens = [round(point["length"] * (0.5 + place / (point["batch size"] + 1))) for place in range(1, 99)]
        tokens = tokens[: point["batch size"]]
        unique = sum(2 * total - round(point["prompt share"] * total) for total in tokens)
        assert trl["processed_per_unique"] == pytest.approx(2 * len(tokens) * max(tokens) / unique, rel=0.02)
        assert ours["processed_per_unique"] >= 1 and len(ours["times_trl"]) == 2


# Parts


def test_score(reward_dir, pairs_file, tmp_path):
    options = ("--dtype", "float32", "--prompt-tokens", "1", "60", "--prompts", "2", "--calls", "2")
    result = run(
        "score", "--model", reward_dir(), "--dataset", pairs_file, *options, "--answers", "1", "4", out=tmp_path
    )
    one, four = result["points"]
    assert (one["answers"], four["answers"]) == (1, 4)
    for point in (one, four):
        assert point["largest_difference"] < 1e-5
        assert point["reward_deviation"] > 1e-3
        assert len(point["times_trl"]) == 2
        # What a fair count cannot undercut: each text whole, against each prompt once.
        tokens = point["answers"] * (point["prompt_tokens"] + point["answer_tokens"])
        unique = point["prompt_tokens"] + point["answers"] * point["answer_tokens"]
        assert point["processed_per_unique"]["trl"] >= 0.99 * tokens / unique
    assert four["processed_per_unique"]["trl"] > one["processed_per_unique"]["trl"]


@pytest.mark.slow
def test_prepare(tiny_llama_dir, pairs_file, tmp_path, in_this_process):
    result = run("prepare", "--model", tiny_llama_dir, "--dataset", pairs_file, "--sizes", "100", out=tmp_path)
    (point,) = result["points"]
    assert point["kept"]["trl"] == point["pairs"] == 100
    assert len(point["pairs_per_second"]["default"]) == 2


def test_rows_that_come_again_are_other_texts(pairs_file, tmp_path):
    from benchmarks.speed_parts import write_rows

    write_rows(pairs_file, "train", 100, tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    assert len(rows) == 100
    first, again = (rows[row]["prompt"][0]["content"] for row in (5, 45))
    assert first.startswith("(0) ")
    assert again == first.replace("(0) ", "(1) ")
    assert rows[5]["chosen"] == rows[45]["chosen"]


def test_head(tiny_llama_dir, tmp_path):
    options = ("--dtype", "float32", "--batch-size", "2", "--length", "16", "--pairs", "8")
    result = run("head", "--model", tiny_llama_dir, *options, out=tmp_path)
    assert set(result["seconds"]) == {"plain", "disco", "model", "posterior"}
    assert len(result["overhead"]) == len(result["posterior"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "pass --dataset"),
        (["score", "--dataset", "x.jsonl"], "pass --model"),
        (["train", "--model", "x", "--dataset", "./missing.jsonl"], "there is no such file"),
    ],
)
def test_what_is_missing_is_named(arguments, message, tiny_llama_dir):
    arguments = [tiny_llama_dir if argument == "x" else argument for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        speed.main(arguments)


# Memory and tables


def peak_of_a_block() -> int:
    """Peak memory of holding a block of 200 MB for dozens of looks."""
    with PeakMemory() as memory:
        block = torch.ones(50_000_000)
        for _ in range(50):
            block.sum()
        del block
    return memory.peak_bytes


def test_peak_memory():
    # As the benchmarks do: what other tests of this process give back meanwhile would be taken from the peak.
    assert 150e6 < in_fresh_process(peak_of_a_block) < 260e6


def test_spread_and_markdown():
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"
    assert spread([1.5]) == "1.50"
    assert markdown([{"": "a", "n": "1"}]) == "|  | n |\n| --- | ---: |\n| a | 1 |"
