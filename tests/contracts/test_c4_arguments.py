"""Contract C4: everything a user of `trl.RewardTrainer` knows keeps working, here its arguments.

`DiscoRewardTrainer` subclasses `RewardTrainer` and takes the same arguments; `DiscoRewardConfig` subclasses
`RewardConfig` and only adds fields. Every kind of dataset and every option keeps the meaning that it has in TRL. Most
tests run both trainers with the same arguments (`train_both`). The options that concern what ours adds (the reward
head, which is trained, saved and kept in float32 without being asked for) are tested with a learned scale.
"""

import inspect
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tiny_training import disco_trainer, preferences, reward_trainer
from train_both import train_both
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification
from trl import RewardConfig, RewardTrainer
from trl.trainer import reward_trainer as trl_reward_trainer

from disco_trl import DiscoRewardConfig, DiscoRewardModel, DiscoRewardTrainer
from disco_trl.models.prefix_sharing import PREFIX


def test_the_trainers_arguments_are_trls():
    ours = inspect.signature(DiscoRewardTrainer.__init__).parameters
    theirs = inspect.signature(RewardTrainer.__init__).parameters
    assert list(ours) == list(theirs)
    for name in theirs:
        assert (ours[name].default, ours[name].kind) == (theirs[name].default, theirs[name].kind), name


def test_the_config_has_every_field_of_trls_with_its_default():
    ours = {field.name: field for field in fields(DiscoRewardConfig)}
    theirs = {field.name: field for field in fields(RewardConfig)}
    # Those that are added are in tests/trainer/test_reward_config.py.
    assert not theirs.keys() - ours.keys()
    for name, field in theirs.items():
        for attribute in ("default", "type", "metadata"):
            assert getattr(ours[name], attribute) == getattr(field, attribute), name
        # A factory may be a function made anew for every class: what it makes is compared.
        factories = [each.default_factory for each in (ours[name], field)]
        assert callable(factories[0]) == callable(factories[1]), name
        if callable(factories[0]):
            assert factories[0]() == factories[1](), name


# The model


def test_no_args(tmp_path, tiny_llama_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL's default is bfloat16, and its config then refuses a machine without a GPU, where ours takes float32.
    for module in ("transformers.training_args", "disco_trl.trainer.shared_config"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
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
    options = {"scale_training": "joint", "calibrate": False}
    trainer = disco_trainer(tmp_path, model=model, optimizers=(optimizer, None), **options, **arguments)
    trainer.train()
    assert model.scale_head.weight.abs().max() > 0
