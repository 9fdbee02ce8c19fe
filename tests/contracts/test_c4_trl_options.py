"""Contract C4: everything a user of `trl.RewardTrainer` knows keeps working.

`DiscoRewardTrainer` subclasses `RewardTrainer` and takes the same arguments; `DiscoRewardConfig` subclasses
`RewardConfig` and only adds fields. Every kind of dataset and every option keeps the meaning it has in TRL.

Most tests here run both trainers with the same arguments, ours as the special case of contract C3, and ask for the
same tokens, the same logs and the same weights: TRL's own trainer is the definition, in whichever version is
installed. The options that concern what ours adds (the reward head, which is trained, saved and kept in float32
without being asked for) are tested with a learned scale.
"""

import contextlib
import copy
import inspect
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard, constants
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import SCALE_STATE
from tiny_training import (
    bradley_terry_trainer,
    disco_trainer,
    furthest,
    logged,
    preferences,
    reward_trainer,
    weights,
)
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer
from trl.trainer import reward_trainer as trl_reward_trainer

from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer
from disco_trl.models.prefix_sharing import PREFIX


TOKENS = ("chosen_ids", "rejected_ids", "margin")


def tokens(dataset: Dataset | IterableDataset) -> list[dict]:
    return [{name: row[name] for name in TOKENS if name in row} for row in dataset]


class WeightsAfterEachStep(TrainerCallback):
    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = weights(model)


def train_both(folder: Path, **arguments) -> tuple[DiscoRewardTrainer, RewardTrainer]:
    """Run both trainers and ask for the same tokens, logs and weights; returns them for further questions."""
    trainers = []
    for build, name in ((bradley_terry_trainer, "ours"), (reward_trainer, "theirs")):
        trainer = build(folder / name, **{"max_steps": 2, **arguments})
        trainer.train()
        trainers.append(trainer)
    ours, theirs = trainers
    assert tokens(ours.train_dataset) == tokens(theirs.train_dataset)
    for our_log, their_log in zip(logged(ours), logged(theirs), strict=True):
        assert their_log == pytest.approx({name: our_log[name] for name in their_log}, abs=1e-4, rel=1e-4)
    assert furthest(weights(ours.model), weights(theirs.model)) < 1e-4
    return ours, theirs


# The signatures


def test_the_trainers_arguments_are_trls():
    ours = inspect.signature(DiscoRewardTrainer.__init__).parameters
    theirs = inspect.signature(RewardTrainer.__init__).parameters
    assert list(ours) == list(theirs)
    for name in theirs:
        assert (ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind), name


def test_the_config_has_every_field_of_trls_with_its_default():
    ours = {field.name: field for field in fields(DiscoRewardConfig)}
    theirs = {field.name: field for field in fields(RewardConfig)}
    # Those that are added are in tests/test_config.py.
    assert not theirs.keys() - ours.keys()
    for name, field in theirs.items():
        for attribute in ("default", "type", "metadata"):
            assert getattr(ours[name], attribute) == getattr(field, attribute), name
        # A factory may be a function made anew for every class: what it makes is compared.
        factories = [each.default_factory for each in (ours[name], field)]
        assert callable(factories[0]) == callable(factories[1]), name
        if callable(factories[0]):
            assert factories[0]() == factories[1](), name


# The data


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
        # Whole batches, over which TRL's means are, and ours are over pairs (tests/test_metrics.py)
        eval_dataset={"short": preferences(rows=8, seed=1), "long": preferences("conversational", rows=8, seed=2)},
        eval_strategy="steps",
        eval_steps=1,
    )
    names = set().union(*ours.state.log_history)
    assert {"eval_short_loss", "eval_long_loss"} <= names


def test_evaluation_of_a_dataset_passed_later(tmp_path, tiny_llama_dir):
    ours, theirs = train_both(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    for data in (preferences(rows=8, seed=1), {"other": preferences("conversational", rows=8, seed=1)}):
        ours_found, theirs_found = (trainer.evaluate(data) for trainer in (ours, theirs))
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


# Training


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="TRL's activation offloading needs an accelerator")
def test_activation_offloading(tmp_path, tiny_llama_dir):
    train_both(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), activation_offloading=True, use_cpu=False)


@pytest.mark.parametrize("disable_dropout", [False, True])
def test_disable_dropout(tmp_path, tiny_tokenizer, disable_dropout):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
    )
    arguments = {"processing_class": tiny_tokenizer, "train_dataset": preferences()}
    trainer = disco_trainer(
        tmp_path, model=BertForSequenceClassification(config), disable_dropout=disable_dropout, **arguments
    )
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.0 if disable_dropout else 0.1}


def test_an_optimizer_of_the_users(tmp_path, tiny_llama_dir):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences()}
    ours, _ = train_both(tmp_path, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}), **arguments)
    assert isinstance(ours.optimizer.optimizer, torch.optim.SGD)


def test_an_optimizer_that_would_leave_the_scale_as_it_is(tmp_path, tiny_llama_dir, tiny_tokenizer):
    arguments = {"processing_class": tiny_tokenizer, "train_dataset": preferences()}
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    with pytest.raises(ValueError, match=r"optimizer.*scale.*optimizer_cls_and_kwargs"):
        disco_trainer(tmp_path, model=stock, optimizers=(torch.optim.SGD(stock.parameters()), None), **arguments)
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir, dtype="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = disco_trainer(tmp_path, model=model, optimizers=(optimizer, None), **arguments)
    trainer.train()
    assert model.scale_head.weight.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resuming_gives_the_same_bits(tmp_path, tiny_llama_dir, lora):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(rows=32)}
    arguments |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    arguments |= {"peft_config": LoraConfig(task_type="SEQ_CLS") if lora else None}
    straight = disco_trainer(tmp_path, **arguments)
    straight.train()
    resumed = disco_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert straight.state.global_step == resumed.state.global_step == 6
    assert furthest(weights(straight.model), weights(resumed.model)) == 0
    assert straight._reward_model.scale_head.mean_hidden.any()  # it is among the weights
    assert logged(straight, "scale")[-1] == logged(resumed, "scale")[-1]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_load_best_model_at_end(tmp_path, tiny_llama_dir, lora):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        eval_dataset=preferences(rows=4, seed=1),
        peft_config=LoraConfig(task_type="SEQ_CLS") if lora else None,
        load_best_model_at_end=True,
        metric_for_best_model="num_tokens",  # the fewer tokens seen the better: the first checkpoint is the best
        greater_is_better=False,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
    )
    after_step = WeightsAfterEachStep()
    trainer.add_callback(after_step)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert furthest(weights(trainer.model), after_step.weights[2]) == 0
    assert furthest(weights(trainer.model), after_step.weights[4]) > 0


# The model


def test_no_args(tmp_path, tiny_llama_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bfloat16, and its config then refuses a machine without a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences()}
    ours, theirs = DiscoRewardTrainer(**arguments), RewardTrainer(**arguments)
    assert type(ours.args) is DiscoRewardConfig
    ours_set, theirs_set = ({**vars(trainer.args), "logging_dir": None} for trainer in (ours, theirs))
    for name in ("_n_gpu", "distributed_state", "deepspeed_plugin"):
        theirs_set.pop(name, None)
    assert {name: ours_set[name] for name in theirs_set} == theirs_set


def test_model_init_kwargs(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
    )
    assert trainer.model.config._attn_implementation.removeprefix(PREFIX) == "eager"
    trainer.train()
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
    head = {name for name in dtypes if name.startswith("score")}
    assert head == {"score.weight", "score.scale.weight"}
    assert {dtypes.pop(name) for name in head} == {torch.float32}
    assert set(dtypes.values()) == {torch.bfloat16}


def test_revision(tmp_path, tiny_llama_dir):
    """From a Hub repository with two revisions, as they lie in the cache."""
    repository = Path(constants.HF_HUB_CACHE) / "models--someone--tiny"
    for revision, commit in (("main", "a" * 40), ("second", "b" * 40)):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
        model.model.norm.weight.data.fill_(2.0 if revision == "second" else 1.0)
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
        tokenizer.chat_template = revision
        for part in (model, tokenizer):
            part.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    ours, theirs = train_both(
        tmp_path,
        model="someone/tiny",
        train_dataset=preferences(),
        model_init_kwargs={"revision": "second"},
        learning_rate=1e-6,
    )
    assert ours.model.model.norm.weight.min() > 1.9
    assert ours.processing_class.chat_template == theirs.processing_class.chat_template


def test_trls_global_is_given_back(tmp_path, tiny_llama_dir):
    stock = trl_reward_trainer.AutoModelForSequenceClassification
    disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    assert trl_reward_trainer.AutoModelForSequenceClassification is stock
    with pytest.raises(ValueError, match="contradicts"):
        path = tmp_path / "normal"
        DiscoRewardModel.from_pretrained(tiny_llama_dir, reward_family="normal").save_pretrained(path)
        disco_trainer(tmp_path, model=str(path), train_dataset=preferences(), reward_family="cauchy")
    assert trl_reward_trainer.AutoModelForSequenceClassification is stock is AutoModelForSequenceClassification


def test_what_trl_refuses_is_refused(tmp_path, tiny_llama_dir, tiny_tokenizer):
    stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    adapted = get_peft_model(stock, LoraConfig(task_type="SEQ_CLS"))
    two_labels = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=2)
    data = {"train_dataset": preferences(), "processing_class": tiny_tokenizer}
    for arguments in (
        {"model": tiny_llama_dir},
        {"model": two_labels, **data},
        {"model": adapted, "peft_config": LoraConfig(), **data},
        {"model": tiny_llama_dir, "peft_config": {"r": 8}, **data},
        {"model": tiny_llama_dir, "eos_token": "<|unknown|>", **data},
    ):
        with pytest.raises((ValueError, TypeError)) as theirs:
            reward_trainer(tmp_path, **arguments)
        with pytest.raises(theirs.type):
            disco_trainer(tmp_path, **arguments)
    with pytest.raises(TypeError, match="DiscoRewardConfig"):
        DiscoRewardTrainer(tiny_llama_dir, RewardConfig(str(tmp_path), use_cpu=True, bf16=False), **data)


# PEFT


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_lora_on_all_linear_layers_needs_no_more_said(tmp_path, tiny_llama_dir, task_type):
    """TRL, told everything, is the reference; told less, it would adapt the head instead of training it."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "max_steps": 2}
    users = LoraConfig(r=4, target_modules="all-linear", task_type=task_type)
    before = copy.deepcopy(users.to_dict())
    ours = bradley_terry_trainer(tmp_path, peft_config=users, **arguments)
    full = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
    theirs = reward_trainer(tmp_path, peft_config=full, **arguments)
    for trainer in (ours, theirs):
        trainer.train()
    assert furthest(weights(ours.model), weights(theirs.model)) < 1e-4
    assert users.to_dict() == before
    assert users.modules_to_save is None


def test_modules_to_save_of_the_users(tmp_path, tiny_llama_dir):
    users = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), peft_config=users)
    assert users.modules_to_save == ["embed_tokens"]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    whole = {name.partition(".modules_to_save.")[0] for name in trained if "modules_to_save" in name}
    assert whole == {"base_model.model.model.embed_tokens", "base_model.model.score"}


def test_tokens_that_a_chat_template_adds_are_trained(tmp_path, tiny_llama_dir, tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tiny_tokenizer.save_pretrained(tmp_path / "chat")
    users = LoraConfig(target_modules=["q_proj"])
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences("conversational"),
        peft_config=users,
        chat_template_path=str(tmp_path / "chat"),
    )
    assert users.trainable_token_indices is None and users.modules_to_save is None
    new = tiny_tokenizer.convert_tokens_to_ids("<|end|>")
    assert new in trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    trainer.train()
    assert trainer.model.get_base_model().scale_head.weight.abs().max() > 0


PEFT_CONFIGS = {
    "lora": LoraConfig(target_modules="all-linear"),
    "dora": LoraConfig(use_dora=True),
    "ia3": IA3Config(),
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=4),
}


@pytest.mark.parametrize("peft_config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_adapters_keep_the_head(tmp_path, tiny_llama_dir, peft_config):
    """Trained, in float32, saved, and the same when the adapter is loaded by its path."""
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(), "peft_config": peft_config}
    trainer = disco_trainer(tmp_path, reward_family="cauchy", **arguments)
    start = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    head = {"weight", *(f"scale.{name}" for name in SCALE_STATE)}
    assert {name.rpartition("modules_to_save.default.")[2] for name in changed if "score" in name} == head
    assert all(module.weight.dtype == torch.float32 for _, module in trainer._reward_model.named_reward_heads())

    trainer.save_model()
    assert json.loads((tmp_path / "disco_config.json").read_text()) == {"reward_family": "cauchy", "fixed_scale": None}
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32").eval()
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        reward = loaded.reward_distribution(**batch) if hasattr(loaded, "reward_distribution") else None
        outputs = [model.eval()(**batch) for model in (trainer.model, loaded)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-6)
    assert torch.allclose(outputs[0].scale, outputs[1].scale, atol=1e-6)
    assert reward is not None and reward.family == "cauchy"


def test_a_peft_model(tmp_path, tiny_llama_dir, tiny_tokenizer):
    trainers = []
    for build in (bradley_terry_trainer, reward_trainer):
        torch.manual_seed(1)
        stock = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1, dtype="float32")
        model = get_peft_model(stock, LoraConfig(task_type="SEQ_CLS"))
        arguments = {"model": model, "train_dataset": preferences(), "processing_class": tiny_tokenizer}
        trainer = build(tmp_path, **arguments)
        trainer.train()
        assert trainer.model is model
        trainers.append(trainer)
    assert furthest(*(weights(trainer.model) for trainer in trainers)) < 1e-4


# Going on from a checkpoint


def locations(model, tokenizer) -> torch.Tensor:
    batch = tokenizer(["the answer", "a short film about people"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits


def test_from_a_bradley_terry_checkpoint(tmp_path, tiny_llama_dir, tiny_tokenizer):
    theirs = reward_trainer(tmp_path / "bt", model=tiny_llama_dir, train_dataset=preferences())
    theirs.train()
    theirs.save_model()
    ours = disco_trainer(tmp_path / "disco", model=str(tmp_path / "bt"), train_dataset=preferences())
    assert torch.allclose(locations(ours.model, tiny_tokenizer), locations(theirs.model, tiny_tokenizer), atol=1e-6)
    ours.train()
    assert ours.model.scale_head.weight.abs().max() > 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_from_a_checkpoint_of_ours(tmp_path, tiny_llama_dir, tiny_tokenizer, lora):
    first = disco_trainer(
        tmp_path / "first",
        model=tiny_llama_dir,
        train_dataset=preferences(),
        reward_family="cauchy",
        peft_config=LoraConfig() if lora else None,
    )
    first.train()
    first.save_model()
    second = disco_trainer(tmp_path / "second", model=str(tmp_path / "first"), train_dataset=preferences())
    assert isinstance(second.model, PeftModel) == lora
    assert second._family.name == "cauchy"
    assert furthest(weights(first.model), weights(second.model)) == 0
    before = locations(second.model, tiny_tokenizer)
    # The same weights at other addresses: matrix products may round differently.
    assert torch.allclose(before, locations(first.model, tiny_tokenizer), atol=1e-6)
    second.train()
    trained = {name for name, parameter in second.model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in first.model.named_parameters() if parameter.requires_grad}
    assert not torch.equal(before, locations(second.model, tiny_tokenizer))


# What is saved


@pytest.mark.parametrize("lora", [False, True], ids=["full", "adapter"])
def test_tags_and_model_card(tmp_path, tiny_llama_dir, lora):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        eval_dataset=preferences(rows=4, seed=1),
        peft_config=LoraConfig() if lora else None,
        save_strategy="steps",
        save_steps=4,
    )
    trainer.train()
    trainer.evaluate()
    assert {"trl", "reward-trainer", "disco-trl"} <= set(trainer._reward_model.model_tags or trainer.model.model_tags)
    assert (tmp_path / "README.md").exists()  # with the checkpoint, as TRL writes its own
    trainer.create_model_card(model_name="my-model", dataset_name="someone/votes", tags="extra")
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data.tags) == {"trl", "reward-trainer", "disco-trl", "extra"}
    assert card.data.datasets in ("someone/votes", ["someone/votes"])
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert card.data.model_name == "my-model"
    for part in ("# my-model", "normal", "Φ(", "eval_nll", "someone/votes", "AutoModelForSequenceClassification"):
        assert part in card.text
    assert tiny_llama_dir not in card.content  # a path on this machine means nothing to a reader


def test_a_saved_model_holds_the_head(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    for name in ("score.weight", "score.scale.weight", "score.scale.mean_hidden"):
        assert torch.equal(saved[name], trainer.model.state_dict()[name])
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
