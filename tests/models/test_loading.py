"""What a checkpoint is: the kind that the loader returns, and what a scale that has not moved yet is read as."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import edited_copy, lora, save_adapter
from tiny_training import disco_trainer, preferences
from transformers import AutoModelForSequenceClassification

from disco_trl import DiscoReward, DiscoRewardModel, best_of_n
from disco_trl.cli.main import main
from disco_trl.models.export import export
from disco_trl.models.inference import load_trained, score
from disco_trl.models.loading import CheckpointKind, load_reward_model
from disco_trl.models.modeling import disco_class


SEQUENCES = [[7, 8, 9, 10, 2], [5, 2], [11, 12, 13, 2]]


def kind_of(path, **kwargs) -> str:
    _, kind = load_reward_model(path, disco_class, **kwargs)
    return kind.value


def scalar_adapter(base: str, path: Path, **options) -> str:
    """An adapter that was trained without disco-trl."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        stock = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        get_peft_model(stock, LoraConfig(init_lora_weights=False, **options)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_kinds_of_full_checkpoints(architecture, base_model_dir, scalar_dir, disco_dir):
    assert kind_of(base_model_dir(architecture)) == "base"
    assert kind_of(scalar_dir(architecture)) == "scalar"
    assert kind_of(disco_dir(architecture)) == "disco"
    # Neither is a matter of what is asked for, nor of whether the scale is learned.
    for fixed_scale in (None, 0.5):
        assert kind_of(base_model_dir(architecture), reward_family="cauchy", fixed_scale=fixed_scale) == "base"
        assert kind_of(scalar_dir(architecture), reward_family="cauchy", fixed_scale=fixed_scale) == "scalar"
        assert kind_of(disco_dir(architecture, fixed_scale=fixed_scale)) == "disco"


def test_a_disco_checkpoint_whose_family_is_given_by_hand(disco_dir, tmp_path):
    path = edited_copy(disco_dir("llama", reward_family="cauchy"), tmp_path / "x", config={"disco": None})
    assert kind_of(path, reward_family="cauchy") == "disco"


@pytest.mark.parametrize("base", ["base", "scalar", "disco"])
def test_kinds_of_adapters(base, base_model_dir, scalar_dir, disco_dir, tmp_path):
    path = {"base": base_model_dir, "scalar": scalar_dir, "disco": disco_dir}[base]("llama")
    # One that has a scale, one that has a head without a scale, and one that has no head at all
    assert kind_of(save_adapter(lora(DiscoRewardModel.from_pretrained(path)), tmp_path / "disco")) == "disco"
    if base != "disco":
        assert kind_of(scalar_adapter(path, tmp_path / "scalar", task_type="SEQ_CLS")) == "scalar"
    if base != "base":
        bare = scalar_adapter(path, tmp_path / "bare", target_modules=["q_proj"])
        assert kind_of(bare) == base
        assert kind_of(bare, fixed_scale=0.5 if base == "scalar" else None) == base


# A scale that has not moved yet


@pytest.fixture(scope="module", params=["adapter", "full"])
def untrained(request, tiny_llama_dir, tmp_path_factory) -> str:
    """What the trainer saves before its first step: a head of the Laplace family whose scale's weight is zero."""
    path = tmp_path_factory.mktemp(request.param)
    trainer = disco_trainer(
        path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        peft_config=LoraConfig(r=2) if request.param == "adapter" else None,
        reward_family="laplace",
    )
    trainer.save_model()
    assert not trainer._reward_model.scale_head.weight.any()
    return str(path)


def test_a_scale_that_has_not_moved_is_one_of_its_family(untrained):
    model, kind = load_reward_model(untrained, disco_class)
    assert kind is CheckpointKind.DISCO
    expected = score(model, SEQUENCES)
    assert expected.family == "laplace"
    assert len(expected.scale.unique()) == 1
    for other in (DiscoRewardModel.from_pretrained(untrained), load_trained(untrained), DiscoReward(untrained).model):
        rewards = score(other, SEQUENCES)
        assert rewards.family == "laplace"
        torch.testing.assert_close(rewards.location, expected.location, rtol=0, atol=0)
        torch.testing.assert_close(rewards.scale, expected.scale, rtol=0, atol=0)


def test_it_is_evaluated_as_one(untrained, tmp_path):
    rows = [{"prompt": "the answer", "chosen": " is short", "rejected": f" is {i} times as long"} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    main(["evaluate", untrained, str(tmp_path / "pairs.jsonl"), "--output_dir", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["family"] == "laplace"


@pytest.mark.parametrize("to", ["two-logit", "disco"])
def test_it_is_exported_as_a_scalar_model_only(to, untrained, tmp_path):
    with pytest.raises(ValueError, match=r"scale is the same for all answers.*use --to scalar"):
        export(untrained, tmp_path / "out", to=to)
    export(untrained, tmp_path / "out", to="scalar")
    assert kind_of(tmp_path / "out") == "scalar"
    rewards = score(DiscoRewardModel.from_pretrained(tmp_path / "out"), SEQUENCES)
    torch.testing.assert_close(rewards.location, score(load_trained(untrained), SEQUENCES).location)


# A model that has none


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_scalar_model_is_read_as_bradley_terry(is_adapter, scalar_dir, tmp_path):
    path = scalar_dir("llama")
    if is_adapter:
        path = scalar_adapter(path, tmp_path / "adapter", task_type="SEQ_CLS")
    rewards = score(load_trained(path), SEQUENCES)
    assert rewards.family == "logistic"
    torch.testing.assert_close(rewards.scale, torch.full((len(SEQUENCES),), 1 / math.sqrt(2)))
    # from_pretrained gives it a scale to train.
    assert score(DiscoRewardModel.from_pretrained(path), SEQUENCES).family == "normal"


def test_a_language_model_is_not_scored_with(base_model_dir):
    with pytest.raises(ValueError, match=r"is a language model without a reward head"):
        load_trained(base_model_dir("llama"))


# A model that is not there

NOWHERE = ["/no/such/folder", "./missing", "../missing", "runs/a/missing", "runs/missing", "missing"]


@pytest.mark.parametrize("path", NOWHERE)
def test_a_folder_that_does_not_exist_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (DiscoReward, load_trained, DiscoRewardModel.from_pretrained, best_of_n_with):
        with pytest.raises(FileNotFoundError, match=rf"^{re.escape(path)}: there is no such folder"):
            load(path)
    with pytest.raises(FileNotFoundError, match=rf"^{re.escape(path)}: there is no such folder"):
        disco_trainer(tmp_path / "out", model=path, train_dataset=preferences())


def best_of_n_with(path: str):
    return best_of_n(["a prompt"], [["an answer", "another"]], model=path)


@pytest.mark.parametrize(
    "command",
    [
        "evaluate {} x.jsonl --output_dir out",
        "export {} out --to scalar",
        "score {} x.jsonl y.jsonl",
        "serve {}",
        "estimate {}",
    ],
)
@pytest.mark.parametrize("path", ["runs/missing", "/no/such/folder"])
def test_so_do_the_commands(command, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(SystemExit, match=rf"^disco-trl \w+: {path}: there is no such folder"):
        main(command.format(path).split())


def test_a_file_in_the_place_of_a_folder(scalar_dir):
    path = f"{scalar_dir('llama')}/model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is a file; name the folder"):
        DiscoReward(path)


def test_an_adapter_whose_base_model_is_gone(scalar_dir, tmp_path):
    path = Path(scalar_adapter(scalar_dir("llama"), tmp_path / "adapter", task_type="SEQ_CLS"))
    entries = json.loads((path / "adapter_config.json").read_text())
    entries["base_model_name_or_path"] = "/moved/away"
    (path / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(FileNotFoundError, match=r"adapter: its base model cannot be found \(/moved/away: there is no"):
        load_trained(str(path))
