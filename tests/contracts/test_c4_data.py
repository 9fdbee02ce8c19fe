"""Contract C4: every kind of dataset and of evaluation set keeps the meaning that it has in TRL."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_training import disco_trainer, preferences
from train_both import tokens, train_both, with_the_names_of_sets


@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
@pytest.mark.parametrize(
    "kind", ["standard", "standard implicit", "conversational", "conversational implicit", "tools"]
)
def test_dataset_kinds(tmp_path, tiny_llama_dir, kind, streaming):
    data = preferences(kind, margin=True)
    if streaming:
        data = data.to_iterable_dataset()
    ours, _ = train_both(tmp_path, model=tiny_llama_dir, train_dataset=data)
    if kind == "tools":
        rows = [ours.processing_class.decode(row["chosen_ids"]) for row in tokens(ours.train_dataset)]
        assert all('"name": "search"' in row for row in rows)


def test_chat_template_kwargs_of_a_row(tmp_path, tiny_llama_dir, tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ greeting }}" + tiny_tokenizer.chat_template
    data = preferences("conversational").add_column("chat_template_kwargs", [{"greeting": "Hello. "}] * 16)
    arguments = {"model": tiny_llama_dir, "train_dataset": data, "processing_class": tiny_tokenizer}
    ours, _ = train_both(tmp_path, **arguments)
    assert tiny_tokenizer.decode(ours.train_dataset[0]["chosen_ids"]).startswith("Hello. ")


@pytest.mark.parametrize("names", [("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")])
@pytest.mark.parametrize("streaming", [False, True], ids=["", "streaming"])
def test_tokenized_data(tmp_path, tiny_llama_dir, names, streaming):
    rng = np.random.default_rng(0)
    rows = [{name: rng.integers(3, 300, rng.integers(2, 9)).tolist() for name in names} for _ in range(16)]
    data = Dataset.from_list(rows)
    data = data.to_iterable_dataset() if streaming else data
    with pytest.warns(FutureWarning, match="legacy") if "input" in names[0] else contextlib.nullcontext():
        ours, _ = train_both(tmp_path, model=tiny_llama_dir, train_dataset=data)
    assert tokens(ours.train_dataset)[3]["chosen_ids"] == rows[3][names[0]]


def test_max_length_filters(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(rows=32)}
    ours, _ = train_both(tmp_path, max_length=14, **arguments)
    everything = disco_trainer(tmp_path, max_length=None, **arguments).train_dataset
    kept = [row for row in tokens(everything) if max(len(ids) for ids in row.values()) <= 14]
    assert 4 <= len(kept) < 32
    assert tokens(ours.train_dataset) == kept


def test_several_processes_prepare_the_data(tmp_path, tiny_llama_dir):
    train_both(tmp_path, model=tiny_llama_dir, train_dataset=preferences("conversational"), dataset_num_proc=2)


@pytest.mark.parametrize("as_directory", [False, True], ids=["jinja file", "tokenizer directory"])
def test_chat_template_path(tmp_path, tiny_llama_dir, tiny_tokenizer, as_directory):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    if as_directory:
        # Another end-of-turn token, which the model has no embedding for yet.
        tokenizer.add_special_tokens({"eos_token": "<|end|>"})
        tokenizer.save_pretrained(tmp_path / "chat")
        path = tmp_path / "chat"
    else:
        path = tmp_path / "chat.jinja"
        path.write_text(tokenizer.chat_template)
    ours, theirs = train_both(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences("conversational"),
        chat_template_path=str(path),
    )
    assert ours.processing_class.chat_template == tokenizer.chat_template
    sizes = [trainer.model.get_input_embeddings().num_embeddings for trainer in (ours, theirs)]
    assert sizes[0] == sizes[1] >= len(ours.processing_class) == len(theirs.processing_class)
    assert (sizes[0] > len(tiny_tokenizer)) == as_directory


def test_eos_token(tmp_path, tiny_llama_dir, tiny_tokenizer):
    ours, theirs = train_both(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), eos_token="<|im_start|>")
    assert ours.processing_class.eos_token == "<|im_start|>"
    assert ours.train_dataset[0]["chosen_ids"][-1] == tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert ours.model.config.eos_token_id == theirs.model.config.eos_token_id


@pytest.mark.parametrize("pad_token", [None, "<|im_start|>"])
def test_pad_token(tmp_path, tiny_llama_dir, tiny_tokenizer, pad_token):
    tiny_tokenizer.pad_token = None
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "processing_class": tiny_tokenizer}
    with pytest.warns(FutureWarning) if pad_token else contextlib.nullcontext():
        ours, theirs = train_both(tmp_path, pad_token=pad_token, pad_to_multiple_of=16, **arguments)
    assert ours.processing_class.pad_token == (pad_token or tiny_tokenizer.eos_token)
    assert ours.model.config.pad_token_id == theirs.model.config.pad_token_id == tiny_tokenizer.pad_token_id
    batch = next(iter(ours.get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0


# Evaluation


def test_several_evaluation_sets(tmp_path, tiny_llama_dir):
    ours, _ = train_both(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        # Whole batches, over which TRL's means are, and ours are over pairs (tests/trainer/test_metrics.py)
        eval_dataset={"short": preferences(rows=8, seed=1), "long": preferences("conversational", rows=8, seed=2)},
        eval_strategy="steps",
        eval_steps=1,
    )
    names = set().union(*ours.state.log_history)
    assert {f"eval_{name}_{metric}" for name in ("short", "long") for metric in ("loss", "accuracy", "nll")} <= names
    assert "eval_accuracy" not in names  # which in TRL is that of the last set


def test_evaluation_of_a_dataset_passed_later(tmp_path, tiny_llama_dir):
    ours, theirs = train_both(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    for data in (preferences(rows=8, seed=1), {"other": preferences("conversational", rows=8, seed=1)}):
        ours_found, theirs_found = (trainer.evaluate(data) for trainer in (ours, theirs))
        theirs_found = with_the_names_of_sets(theirs_found)
        compared = [name for name in theirs_found if "loss" in name or "accuracy" in name or "reward" in name]
        assert len(compared) == 5
        for name in compared:
            assert ours_found[name] == pytest.approx(theirs_found[name], abs=1e-4)


def test_compute_metrics_gets_what_it_gets_from_trl(tmp_path, tiny_llama_dir):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"spread": float(np.ptp(prediction.predictions))}

    def preprocess(logits, labels):
        assert isinstance(logits, torch.Tensor)
        return logits * 2

    arguments = {
        "model": tiny_llama_dir,
        "train_dataset": preferences(),
        "eval_dataset": preferences(rows=6, seed=1),
        "compute_metrics": compute_metrics,
        "preprocess_logits_for_metrics": preprocess,
    }
    ours, theirs = train_both(tmp_path, **arguments)
    seen.clear()
    results = [trainer.evaluate() for trainer in (ours, theirs)]
    assert len(seen) == 2
    # One array, the locations, of which TRL gives as many as there are rows of the batches.
    assert isinstance(seen[0].predictions, np.ndarray)
    assert seen[0].predictions.shape == seen[1].predictions.shape
    assert np.allclose(seen[0].predictions, seen[1].predictions, atol=1e-4)
    assert results[0]["eval_spread"] == pytest.approx(results[1]["eval_spread"], abs=1e-4)
    predictions = [trainer.predict(trainer.eval_dataset).predictions for trainer in (ours, theirs)]
    assert np.allclose(*predictions, atol=1e-4)
