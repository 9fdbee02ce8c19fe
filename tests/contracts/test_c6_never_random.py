"""Contract C6: no reward is ever silently random.

What a directory is follows from its files, and from its config only where they hold no head:

1. A base language model is a fresh start: a fresh head and scale, named in `model.newly_initialized`, and no error.
   Its own layers have to be there, all of them, and no others.
2. Files with a head of one row are a reward model, whatever their config says. A head of another shape is an error,
   and so is a missing one if the config promises one. If the config says that it is a disco model, so is a missing
   scale; if the files hold a scale and the config does not say of which family, so is that.
3. An adapter has to bring what its base model has not, and the head if it was trained with it.
4. `reward_family` and `fixed_scale` that contradict a checkpoint are an error.
5. Whatever has another kind of head, or one that cannot carry two numbers, is refused by name. So is a live model
   whose head is quantized or would be lost when its adapter is saved; a model that is refused is left as it was.
6. What a checkpoint does not bring is initialized: the scale to zeros, whatever the memory held before.
7. Code in a checkpoint is not run unless `trust_remote_code=True`.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    EOS,
    SCALE_STATE,
    VOCAB,
    batch,
    edited_copy,
    head_of,
    load_stock,
    lora,
    save_adapter,
    tiny_config,
)
from tiny_training import disco_trainer
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from disco_trl import DiscoRewardModel
from disco_trl.models.adapters import ADAPTER_SETTINGS_FILE
from disco_trl.models.inference import load_trained
from disco_trl.models.loading import CheckpointKind, load_reward_model
from disco_trl.models.modeling import disco_class
from disco_trl.models.upgrade import upgrade


all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
load = DiscoRewardModel.from_pretrained


# 1. Base language models

FRESH = {
    "bert": ("bert.pooler.dense", "classifier", "classifier.scale"),
    "roberta": ("classifier.dense", "classifier.out_proj", "classifier.out_proj.scale"),
    "deberta_v2": ("classifier", "classifier.scale", "pooler.dense"),
    "modernbert": ("classifier", "classifier.scale"),
    "eurobert": ("classifier", "classifier.scale", "dense"),
}


@all_architectures
def test_a_base_model_is_a_fresh_start(architecture, base_model_dir):
    model = load(base_model_dir(architecture))
    assert model.newly_initialized == FRESH.get(architecture, ("score", "score.scale"))
    assert model.config.disco == {"reward_family": "normal", "fixed_scale": None}


def test_a_bare_backbone_is_a_fresh_start(base_model_dir, tmp_path):
    transformers.AutoModel.from_pretrained(base_model_dir("qwen2")).save_pretrained(tmp_path)
    assert load(tmp_path).newly_initialized == ("score", "score.scale")


@pytest.mark.parametrize(
    ("architecture", "lost"), [("llama", "model.layers.1.mlp"), ("bert", "bert.encoder.layer.1.output")]
)
def test_a_base_model_with_layers_missing(architecture, lost, base_model_dir, tmp_path):
    path = edited_copy(base_model_dir(architecture), tmp_path / "x", drop=(lost,))
    with pytest.raises(ValueError, match=rf"files lack {lost}.*random in part"):
        load(path)


@pytest.mark.parametrize(
    ("architecture", "entry", "layer"),
    [
        ("llama", "num_hidden_layers", "model.layers.1"),
        ("gpt2", "n_layer", "transformer.h.1"),
        ("bert", "num_hidden_layers", "bert.encoder.layer.1"),
    ],
)
def test_a_config_with_another_number_of_layers_than_the_files(
    architecture, entry, layer, base_model_dir, scalar_dir, tmp_path
):
    for kind, source in (("base", base_model_dir), ("scalar", scalar_dir)):
        path = edited_copy(source(architecture), tmp_path / f"{kind}-fewer", config={entry: 1})
        with pytest.raises(ValueError, match=rf"files hold {layer}\..*config\.json leaves no room.*num_hidden_layers"):
            load(path)
        path = edited_copy(source(architecture), tmp_path / f"{kind}-more", config={entry: 3})
        with pytest.raises(ValueError, match=rf"files lack {layer.replace('.1', '.2')}\..*random in part"):
            load(path)


def test_a_config_without_the_biases_of_the_files(base_model_dir, tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    path = edited_copy(base_model_dir("llama"), tmp_path / "x", tensors=bias)
    with pytest.raises(ValueError, match=r"files hold model\.layers\.0\.self_attn\.q_proj\.bias.*leaves no room"):
        load(path)


def test_what_belongs_to_no_layer_is_left_out(base_model_dir, tmp_path):
    # Computed today, and still in old files; a pooler that a classifier does not use; and the head of another task.
    extra = {
        "roberta.pooler.dense.weight": torch.ones(64, 64),
        "roberta.encoder.layer.0.attention.self.position_ids": torch.arange(4),
        "cls.seq_relationship.weight": torch.ones(2, 64),
    }
    path = edited_copy(base_model_dir("roberta"), tmp_path / "x", tensors=extra)
    assert load(path).newly_initialized == FRESH["roberta"]


# 2. Reward models


@all_architectures
def test_a_missing_head(architecture, disco_dir, scalar_dir, tmp_path):
    head_name = load(disco_dir(architecture)).head_name
    for kind, source in (("disco", disco_dir), ("scalar", scalar_dir)):
        path = edited_copy(source(architecture), tmp_path / kind, drop=(f"{head_name}.weight",))
        with pytest.raises(ValueError, match=rf"files lack {head_name}\.weight; rewards would be random"):
            load(path)


@pytest.mark.parametrize("lost", ["classifier.bias", "bert.pooler.dense.weight"])
def test_a_missing_part_of_a_head(lost, disco_dir, tmp_path):
    path = edited_copy(disco_dir("bert"), tmp_path / "x", drop=(lost,))
    with pytest.raises(ValueError, match=rf"files lack {lost}"):
        load(path)


@all_architectures
def test_a_missing_scale(architecture, disco_dir, tmp_path):
    scale = f"{load(disco_dir(architecture)).head_name}.scale"
    path = edited_copy(disco_dir(architecture), tmp_path / "x", drop=(scale,))
    with pytest.raises(ValueError, match=rf"scale was learned, but its files lack {scale}.*remove 'disco'"):
        load(path)
    # The fix that the message names: what is left is a scalar reward model.
    path = edited_copy(path, tmp_path / "fixed", config={"disco": None})
    assert load(path).newly_initialized == (scale,)


@pytest.mark.parametrize("name", SCALE_STATE)
def test_a_missing_part_of_a_scale(name, disco_dir, tmp_path):
    path = edited_copy(disco_dir("llama"), tmp_path / "x", drop=(f"score.scale.{name}",))
    with pytest.raises(ValueError, match=rf"files lack score\.scale\.{name}"):
        load(path)


def test_a_scale_of_no_known_family(disco_dir, tmp_path):
    path = edited_copy(disco_dir("llama", reward_family="cauchy"), tmp_path / "x", config={"disco": None})
    with pytest.raises(
        ValueError, match=r"files hold a scale, but config\.json does not name the family.*reward_family="
    ):
        load(path)
    model = load(path, reward_family="cauchy")
    assert model.newly_initialized == ()
    assert model.score.scale.weight.abs().max() > 0


CONFIGS_OF_OTHERS = {
    "no number of labels": {"id2label": None, "label2id": None},
    "two labels": {"id2label": {"0": "A", "1": "B"}},
    "no architecture": {"architectures": None},
    "a language model's": {"architectures": ["LlamaForCausalLM"], "id2label": None},
    "a backbone's": {"architectures": ["LlamaModel"]},
    "RewardModel": {"architectures": ["RewardModel"]},
    "code of its own": {"architectures": ["MineForReward"], "auto_map": {"AutoModel": "modeling.MineForReward"}},
}


@pytest.mark.parametrize("config", CONFIGS_OF_OTHERS.values(), ids=CONFIGS_OF_OTHERS)
@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_head_of_one_row_makes_a_reward_model(config, is_sharded, scalar_dir, tmp_path):
    """Transformers and TRL load all of these with `num_labels=1`, and so get the trained head."""
    path = edited_copy(scalar_dir("llama"), tmp_path / "x", config=config)
    if is_sharded:
        stock = load_stock(scalar_dir("llama"))
        (tmp_path / "x" / "model.safetensors").unlink()
        entries = (tmp_path / "x" / "config.json").read_text()
        stock.save_pretrained(path, max_shard_size="20KB")
        (tmp_path / "x" / "config.json").write_text(entries)
        assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        expected = load_stock(path)(**batch(4)).logits
        for kwargs in ({}, {"num_labels": 1}):
            model, kind = load_reward_model(path, disco_class, **kwargs)
            assert kind is CheckpointKind.SCALAR
            torch.testing.assert_close(model.eval()(**batch(4)).logits, expected, rtol=0, atol=1e-6)
        assert load_trained(path).config.disco["reward_family"] == "logistic"


def test_so_does_one_with_a_scale(disco_dir, tmp_path):
    path = edited_copy(disco_dir("llama"), tmp_path / "x", config={"architectures": None, "id2label": None})
    model, kind = load_reward_model(path, disco_class)
    assert kind is CheckpointKind.DISCO and model.newly_initialized == ()


def test_and_so_it_is_trained(scalar_dir, tiny_tokenizer, tmp_path):
    for name, config in CONFIGS_OF_OTHERS.items():
        path = edited_copy(scalar_dir("llama"), tmp_path / name, config=config)
        trainer = disco_trainer(
            tmp_path / "out",
            model=path,
            model_init_kwargs={"num_labels": 1},
            processing_class=tiny_tokenizer,
            train_dataset=Dataset.from_list([{"chosen_ids": [5, 6, 7, EOS], "rejected_ids": [8, 9, EOS]}] * 4),
        )
        assert torch.equal(trainer.model.score.weight, load_stock(path).score.weight), name


@pytest.mark.parametrize("config", CONFIGS_OF_OTHERS.values(), ids=CONFIGS_OF_OTHERS)
def test_a_head_of_several_rows_does_not(config, scalar_dir, tmp_path):
    head = {"score.weight": torch.ones(2, 64)}
    path = edited_copy(scalar_dir("llama"), tmp_path / "x", config=config, tensors=head)
    with pytest.raises(ValueError, match=r"score\.weight has shape \[2, 64\].*a classifier with 2 labels.*\[1, 64\]"):
        load(path)


def test_a_head_with_a_bias_that_the_classifier_has_not(scalar_dir, tmp_path):
    path = edited_copy(scalar_dir("llama"), tmp_path / "x", tensors={"score.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"files hold score\.bias, for which its config\.json leaves no room"):
        load(path)


@pytest.mark.parametrize("key", ["v_head.summary.weight", "value_head.weight", "rm_head.weight", "classifier.weight"])
def test_a_head_under_another_name(key, base_model_dir, tmp_path):
    path = edited_copy(base_model_dir("llama"), tmp_path / "x", tensors={key: torch.ones(1, 64)})
    with pytest.raises(ValueError, match=rf"trained head {key}, which would be thrown away.*head in score\.weight"):
        load(path)


@pytest.mark.parametrize("key", ["score.weight", "score.scale.weight"])
@pytest.mark.parametrize("kwargs", [{}, {"ignore_mismatched_sizes": True}])
def test_a_head_of_another_shape(key, kwargs, disco_dir, tmp_path):
    path = edited_copy(disco_dir("llama"), tmp_path / "x", tensors={key: torch.ones(3, 64)})
    with pytest.raises(ValueError, match=rf"{key} has shape \[3, 64\] in its files.*\[1, 64\]"):
        load(path, **kwargs)


# 3. Adapters


@pytest.fixture(scope="module")
def adapter_dir(base_model_dir, tmp_path_factory) -> str:
    return save_adapter(
        lora(load(base_model_dir("llama"), reward_family="cauchy")), tmp_path_factory.mktemp("adapter")
    )


@pytest.fixture(scope="module")
def bert_adapter_dir(base_model_dir, tmp_path_factory) -> str:
    return save_adapter(lora(load(base_model_dir("bert"))), tmp_path_factory.mktemp("bert-adapter"))


def test_the_adapter_itself_loads(adapter_dir, bert_adapter_dir):
    assert load(adapter_dir).get_base_model().config.disco["reward_family"] == "cauchy"
    assert load(adapter_dir, reward_family="cauchy").get_base_model().config.disco["reward_family"] == "cauchy"
    load(bert_adapter_dir)


@pytest.mark.parametrize("lost", ["score.weight", "score.scale.", "score.scale.mean_hidden", "score."])
def test_an_adapter_without_its_head_or_scale(lost, adapter_dir, tmp_path):
    path = edited_copy(adapter_dir, tmp_path / "x", drop=(f"base_model.model.{lost}",))
    with pytest.raises(ValueError, match=rf"adapter lacks .*{lost}.*random.*modules_to_save"):
        load(path)


@pytest.mark.parametrize("lost", ["classifier.bias", "bert.pooler.dense.weight"])
def test_an_adapter_without_a_layer_that_its_base_lacks(lost, bert_adapter_dir, tmp_path):
    path = edited_copy(bert_adapter_dir, tmp_path / "x", drop=(f"base_model.model.{lost}",))
    with pytest.raises(ValueError, match=rf"adapter lacks {lost}"):
        load(path)


def test_an_adapter_without_its_head_on_a_reward_model(disco_dir, tmp_path):
    # Its base has a head of its own, but the adapter says that it was trained with another.
    adapter = save_adapter(lora(load(disco_dir("llama"))), tmp_path / "a")
    path = edited_copy(adapter, tmp_path / "b", drop=("base_model.model.score.",))
    with pytest.raises(ValueError, match=r"adapter lacks score\.scale\..*mean_hidden.*those of its base model"):
        load(path)


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_on_a_base_with_another_number_of_layers(layers, base_model_dir, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = transformers.LlamaForCausalLM(tiny_config("llama", num_hidden_layers=layers))
    other.save_pretrained(tmp_path / "base")
    model = load(base_model_dir("llama"))
    path = Path(save_adapter(get_peft_model(model, LoraConfig(task_type="SEQ_CLS")), tmp_path / "x"))
    entries = json.loads((path / "adapter_config.json").read_text())
    entries["base_model_name_or_path"] = str(tmp_path / "base")
    (path / "adapter_config.json").write_text(json.dumps(entries))
    message = {1: r"adapter holds model\.layers\.1\..*does not have", 3: r"lack a part of the adapter.*layers\.2\."}
    with pytest.raises(ValueError, match=rf"{message[layers]}.*base model that it was trained on"):
        load(path)


def test_an_adapter_of_a_classifier(base_model_dir, tmp_path):
    stock = AutoModelForSequenceClassification.from_pretrained(base_model_dir("llama"), num_labels=3)
    get_peft_model(stock, LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"score\.weight has shape \[3, 64\].*has \[1, 64\]; it is a classifier"):
        load(tmp_path)


def test_an_adapter_that_loses_its_settings(adapter_dir, tmp_path):
    path = edited_copy(adapter_dir, tmp_path / "x")
    (Path(path) / ADAPTER_SETTINGS_FILE).unlink()
    with pytest.raises(ValueError, match=rf"holds a scale, but {ADAPTER_SETTINGS_FILE}.*is missing.*reward_family="):
        load(path)
    assert load(path, reward_family="cauchy").get_base_model().config.disco["reward_family"] == "cauchy"


def test_an_adapter_with_pickled_weights_only(adapter_dir, tmp_path):
    path = Path(edited_copy(adapter_dir, tmp_path / "x"))
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter_model\.safetensors \(pickled weights are not loaded\)"):
        load(path)


def test_an_adapter_without_a_head_of_its_own_uses_that_of_its_base(disco_dir, tmp_path):
    # LoRA that leaves the head alone, made by PEFT on a disco checkpoint: nothing is missing, nothing contradicts.
    path = disco_dir("llama", reward_family="cauchy")
    model = load(path)
    peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    peft_model.save_pretrained(tmp_path)
    loaded = load(tmp_path).eval()
    assert loaded.get_base_model().config.disco["reward_family"] == "cauchy"
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch(4)).scale, peft_model(**batch(4)).scale, rtol=0, atol=0)


# 4. Contradictions


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ({"reward_family": "cauchy"}, {"reward_family": "normal"}, r"reward_family='normal'.*reward_family='cauchy'"),
        ({}, {"fixed_scale": 0.5}, r"fixed_scale=0\.5.*fixed_scale=None"),
        ({"fixed_scale": 2.0}, {"fixed_scale": 0.5}, r"fixed_scale=0\.5.*fixed_scale=2\.0"),
    ],
)
def test_what_contradicts_a_checkpoint(stored, asked, message, disco_dir):
    path = disco_dir("llama", **stored)
    with pytest.raises(ValueError, match=rf"{message}; leave .* out"):
        load(path, **asked)
    with pytest.raises(ValueError, match=message):
        upgrade(load(path), **asked)


def test_what_contradicts_an_adapter(adapter_dir):
    with pytest.raises(ValueError, match=r"reward_family='normal' contradicts.*reward_family='cauchy'"):
        load(adapter_dir, reward_family="normal")


def test_an_adapter_of_another_family_than_its_base(disco_dir, tmp_path):
    path = Path(save_adapter(lora(load(disco_dir("llama"))), tmp_path))
    (path / ADAPTER_SETTINGS_FILE).write_text(json.dumps({"reward_family": "logistic", "fixed_scale": None}))
    with pytest.raises(ValueError, match=r"reward_family='logistic' contradicts.*reward_family='normal'"):
        load(path)


def test_an_unknown_family(base_model_dir):
    with pytest.raises(ValueError, match=r"'gumbel' is unknown; choose one of 'normal', 'cauchy', 'logistic'"):
        load(base_model_dir("llama"), reward_family="gumbel")


@pytest.mark.parametrize("fixed_scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none(fixed_scale, base_model_dir):
    with pytest.raises(ValueError, match=r"fixed_scale=.* must be a positive, finite number"):
        load(base_model_dir("llama"), fixed_scale=fixed_scale)


def test_a_family_given_by_position_is_not_passed_over(base_model_dir):
    with pytest.raises(TypeError):
        load(base_model_dir("llama"), "cauchy")


# 5. What cannot be a reward model


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["LlamaForTokenClassification"]}, r"LlamaForTokenClassification, whose trained head"),
        ({"architectures": ["LlamaForQuestionAnswering"]}, r"LlamaForQuestionAnswering, whose trained head"),
        ({"architectures": ["LlamaForRewardModel"]}, r"LlamaForRewardModel, whose trained head"),
        ({"architectures": ["RewardModel"]}, r"RewardModel, whose trained head"),
        # Its own code would know the head; without that, the head would be left out.
        (
            {"architectures": ["LlamaForRewardModel"], "auto_map": {"AutoModel": "modeling.LlamaForRewardModel"}},
            r"LlamaForRewardModel, whose trained head",
        ),
        (
            {"architectures": ["GPTRewardModel"], "auto_map": {"AutoModel": "modeling.GPTRewardModel"}},
            r"GPTRewardModel, whose trained head",
        ),
        ({"architectures": ["LlamaWithExtraHead"]}, r"LlamaWithExtraHead, whose trained head"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "A"}}, r"lack score\.weight"),
        ({"architectures": ["LlamaForSequenceClassification"], "id2label": None}, r"lack score\.weight"),
    ],
)
def test_a_config_that_announces_a_head_that_the_files_do_not_hold(config, message, base_model_dir, tmp_path):
    path = edited_copy(base_model_dir("llama"), tmp_path / "x", config=config)
    with pytest.raises(ValueError, match=message):
        load(path)


_FLAUBERT = {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 1, "n_heads": 2}
UNFIT = {
    "mamba": ("MambaForCausalLM", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1}),
    "xlnet": ("XLNetLMHeadModel", {"vocab_size": VOCAB, "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}),
    "flaubert-last": ("FlaubertWithLMHeadModel", {**_FLAUBERT, "summary_type": "last"}),
    "xlm-tanh": ("XLMWithLMHeadModel", {**_FLAUBERT, "summary_activation": "tanh"}),
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamba", "no sequence classifier for the architecture 'mamba'"),
        ("xlnet", r"XLNetForSequenceClassification cannot carry .*it reads a text at 'last'.*padding included"),
        ("flaubert-last", r"FlaubertForSequenceClassification cannot carry .*it reads a text at 'last'"),
        (
            "xlm-tanh",
            r"XLMForSequenceClassification cannot carry .*activation 'tanh' follows .*sequence_summary\.summary",
        ),
    ],
)
def test_an_architecture_that_cannot_carry_a_distribution(name, message, tmp_path):
    class_name, sizes = UNFIT[name]
    model_class = getattr(transformers, class_name)
    model_class(model_class.config_class(**sizes)).save_pretrained(tmp_path)
    if name.startswith(("flaubert", "xlm-")):  # one that can does not open the door to others of its architecture
        model_class(model_class.config_class(**_FLAUBERT)).save_pretrained(tmp_path / "fit")
        load(tmp_path / "fit")
    # Refused by the config alone, before any weights are read.
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_live_classifier_with_two_labels(base_model_dir):
    model = AutoModelForSequenceClassification.from_pretrained(base_model_dir("llama"), num_labels=2)
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification has num_labels=2.*one output"):
        upgrade(model)
    assert not isinstance(model, DiscoRewardModel)


def test_a_live_model_with_a_quantized_head(scalar_dir):
    import bitsandbytes

    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    model = load_stock(scalar_dir("llama"), quantization_config=quantization)
    assert isinstance(model.score, bitsandbytes.nn.Linear4bit)
    with pytest.raises(
        ValueError, match=r"head 'score' of this LlamaForSequenceClassification is a bitsandbytes.*Linear4bit"
    ):
        upgrade(model)
    assert not isinstance(model, DiscoRewardModel)


def test_a_live_model_whose_head_was_replaced(scalar_dir):
    model = load_stock(scalar_dir("llama"))
    model.score = torch.nn.Sequential(torch.nn.Dropout(0.1), model.score)
    for _ in range(2):  # the second time as well: the first has left nothing behind
        with pytest.raises(
            ValueError, match=r"head 'score' of this LlamaForSequenceClassification is a torch.*Sequential"
        ):
            upgrade(model)
    assert not isinstance(model, DiscoRewardModel)


def test_a_live_peft_model_that_is_frozen(scalar_dir, adapter_dir):
    model = get_peft_model(load_stock(scalar_dir("llama")), LoraConfig(task_type="SEQ_CLS", inference_mode=True))
    with pytest.raises(ValueError, match=r"is frozen \(inference_mode=True\), so nothing would be trained"):
        upgrade(model)
    assert not isinstance(model.get_base_model(), DiscoRewardModel)
    # An adapter that was loaded for scoring only is frozen, head included.
    with pytest.raises(ValueError, match=r"is frozen .*is_trainable=True"):
        upgrade(load(adapter_dir))
    upgrade(load(adapter_dir, is_trainable=True))


@pytest.mark.parametrize("architecture", ["llama", "bert", "roberta", "deberta_v2", "eurobert"])
def test_a_live_peft_model_whose_head_is_not_trained(architecture, base_model_dir, tmp_path):
    """A plain LoRA config freezes the head, and layers beside it, which are random and which PEFT would not save."""
    stock = load_stock(base_model_dir(architecture))
    targets = ["q_proj", "query", "query_proj"]
    model = get_peft_model(stock, LoraConfig(target_modules=targets, init_lora_weights=False))
    inner = upgrade(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    block = inner.head_name.split(".")[0]
    assert {name for name in trained if "lora_" not in name} == {
        f"base_model.model.{block}.modules_to_save.default.{name}"
        for name, _ in inner.get_submodule(block).modules_to_save["default"].named_parameters()
    }
    with torch.no_grad():
        inner.reward_head.weight.mul_(3)
    model.eval().save_pretrained(tmp_path)
    (tmp_path / ADAPTER_SETTINGS_FILE).write_text(json.dumps(inner.config.disco))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path).eval()(**batch(4)).logits, model(**batch(4)).logits)


def test_a_live_peft_model_with_lora_on_its_head(scalar_dir):
    # "all-linear" takes the head for a layer of the backbone, unless the task type says otherwise.
    model = get_peft_model(load_stock(scalar_dir("llama")), LoraConfig(target_modules="all-linear"))
    with pytest.raises(
        ValueError, match=r"head 'score' of this LlamaForSequenceClassification is a peft.*Linear; .*SEQ_CLS"
    ):
        upgrade(model)


# 6. Dirty memory


@pytest.fixture
def dirty_memory(monkeypatch):
    """New memory that is never zero: what a real allocator hands out after the first gigabytes."""

    def dirty(make):
        def wrapper(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor

        return wrapper

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, dirty(getattr(torch, name)))


@all_architectures
@pytest.mark.parametrize("source", ["base", "scalar"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}], ids=["plain", "bf16", "map"]
)
def test_memory_is_not_taken_as_it_comes(architecture, source, kwargs, base_model_dir, scalar_dir, dirty_memory):
    model = load({"base": base_model_dir, "scalar": scalar_dir}[source](architecture), **kwargs)
    head = head_of(model)
    assert set(head.scale.state_dict()) == set(SCALE_STATE)
    for name, tensor in head.scale.state_dict().items():
        assert torch.equal(tensor, torch.zeros_like(tensor)), name
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    assert head.weight.abs().max() > 0


def test_the_dirty_memory_is_dirty(dirty_memory):
    assert torch.isnan(torch.empty_like(torch.zeros(3))).all()
    assert torch.isnan(torch.empty(3)).all()


# 7. Code in a checkpoint


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mine", "architectures": ["MineForCausalLM"]}, r"trust_remote_code=True"),
        ({"model_type": "mine", "architectures": ["MineForSequenceClassification"]}, r"trust_remote_code=True"),
        ({"architectures": ["MineForRewardModel"]}, r"MineForRewardModel, whose trained head"),
        ({"architectures": ["MineForSequenceClassification"], "id2label": {"0": "A"}}, r"lack score\.weight"),
    ],
)
def test_code_in_a_checkpoint_is_not_run(config, message, base_model_dir, tmp_path):
    witness = tmp_path / "was-run"
    auto_map = {
        name: f"modeling_mine.{class_name}"
        for name, class_name in (
            ("AutoConfig", "MineConfig"),
            ("AutoModel", "MineModel"),
            ("AutoModelForCausalLM", "MineForCausalLM"),
            ("AutoModelForSequenceClassification", "MineForSequenceClassification"),
        )
    }
    path = edited_copy(base_model_dir("llama"), tmp_path / "x", config={**config, "auto_map": auto_map})
    (Path(path) / "modeling_mine.py").write_text(
        f"open({str(witness)!r}, 'w').close()\nfrom transformers import LlamaConfig as MineConfig\n"
    )
    with pytest.raises(ValueError, match=message):
        load(path)
    assert not witness.exists()


def test_only_a_trusted_checkpoint_runs_its_code(base_model_dir, tmp_path):
    path = edited_copy(
        base_model_dir("llama"),
        tmp_path / "x",
        config={"auto_map": {"AutoModelForSequenceClassification": "modeling_mine.LlamaForSequenceClassification"}},
    )
    witness = tmp_path / "was-run"
    (Path(path) / "modeling_mine.py").write_text(
        f"open({str(witness)!r}, 'w').close()\nfrom transformers import LlamaForSequenceClassification\n"
    )
    assert load(path).newly_initialized == ("score", "score.scale")
    assert not witness.exists()
    load(path, trust_remote_code=True)
    assert witness.exists()


def test_the_config_classes_are_those_of_the_library():
    # The tables above rely on it: a typing error in a config would otherwise pass for a refusal.
    for architecture in ARCHITECTURES:
        assert type(tiny_config(architecture)).__module__.startswith("transformers.models.")
