"""Contract C2, the ways in: what becomes a live disco model, and how it is loaded.

1. From a base language model, whose fresh head is the stock one at the same seed: not one random number more is taken.
   Its scales start at the family's unit.
2. From a user's Bradley–Terry model, by path or as an instance (`upgrade`, in place, also inside a `PeftModel`): it
   scores identically afterwards, with the same parameter objects and scales at the unit.
3. From a disco checkpoint, whose locations and scales come back bit by bit, and from a PEFT adapter, by path.
4. In float32, bfloat16, float16 and 4-bit, with a device map: the head stays float32 and whole in all of them, with
   the very values of the files. The arguments passed are left as they were.
"""

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    SCALE_STATE,
    batch,
    head_of,
    load,
    load_stock,
    lora,
    randomize_heads,
    save_adapter,
    tiny_config,
)
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from disco_trl import DiscoRewardModel, get_family
from disco_trl.models import modeling
from disco_trl.models.heads import DiscoHead
from disco_trl.models.scale_head import ScaleHead
from disco_trl.models.upgrade import upgrade


all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


# 1, 2, 3. Where it comes from


@all_architectures
def test_a_round_trip_keeps_location_and_scale(architecture, disco_dir, tmp_path):
    model = load(disco_dir(architecture))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.newly_initialized == ()
    expected = model.state_dict()
    assert {f"{model.head_name}.scale.{name}" for name in SCALE_STATE} <= set(expected)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        assert torch.equal(again(**batch(4)).scale, model(**batch(4)).scale)


@all_architectures
def test_a_base_model_gets_the_stock_head_and_the_unit_scale(architecture, base_model_dir, monkeypatch):
    monkeypatch.setattr(modeling, "_CLASSES", {})  # as in a new process: making the class takes no random number
    torch.manual_seed(11)
    stock = load_stock(base_model_dir(architecture))
    after_stock = torch.rand(())
    torch.manual_seed(11)
    model = load(base_model_dir(architecture), reward_family="cauchy")
    after_disco = torch.rand(())
    # Every parameter, fresh ones included, is what the stock class gets at this seed, and the generator has gone on
    # just as far: nothing that comes after it is shifted.
    state = model.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(after_stock, after_disco)
    assert model.head_name in model.newly_initialized
    with torch.no_grad():
        scale = model(**batch(4)).scale
    torch.testing.assert_close(scale, torch.full((4, 1), get_family("cauchy").unit_scale))


@all_architectures
def test_a_scalar_reward_model_scores_identically(architecture, scalar_dir):
    stock = load_stock(scalar_dir(architecture))
    model = load(scalar_dir(architecture))
    assert model.newly_initialized == (f"{model.head_name}.scale",)
    inputs = batch(4)
    with torch.no_grad():
        expected = stock(**inputs).logits
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)

        upgraded = upgrade(stock)
        assert upgraded is stock
        assert isinstance(stock, DiscoRewardModel)
        torch.testing.assert_close(stock(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stock(**inputs).scale, model(**inputs).scale)


def test_upgrade_keeps_the_parameters_an_optimizer_may_hold(scalar_dir):
    stock = load_stock(scalar_dir("bert"))
    before = dict(stock.named_parameters())
    upgrade(stock, reward_family="logistic")
    after = dict(stock.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {"classifier.scale.weight"}
    assert upgrade(stock) is stock  # and again: nothing happens
    assert stock.config.disco == {"reward_family": "logistic", "fixed_scale": None}
    assert not upgrade(stock).training


def test_upgrade_follows_a_bfloat16_model(scalar_dir):
    stock = AutoModelForSequenceClassification.from_pretrained(
        scalar_dir("llama"), num_labels=1, dtype=torch.bfloat16
    ).eval()
    inputs = batch(4)
    with torch.no_grad():
        expected = stock(**inputs).logits.float()
        output = upgrade(stock)(**inputs)
    assert {parameter.dtype for parameter in head_of(stock).parameters()} == {torch.float32}
    assert output.logits.dtype == output.scale.dtype == torch.float32
    torch.testing.assert_close(output.logits, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("architecture", ["llama", "roberta", "bert"])
def test_upgrade_of_a_peft_model(architecture, scalar_dir, tmp_path):
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    peft_model = get_peft_model(load_stock(scalar_dir(architecture)), config).eval()
    inputs = batch(4)
    with torch.no_grad():
        expected = peft_model(**inputs).logits
    inner = upgrade(peft_model)
    assert inner is peft_model.get_base_model()
    # The head exists twice, frozen and trained, and both have a scale of their own; the trained one is in use.
    trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
    assert sum(".scale." in name for name in trained) == 1
    assert all("modules_to_save" in name for name in trained if ".scale." in name)
    with torch.no_grad():
        torch.testing.assert_close(peft_model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    randomize_heads(inner)
    with torch.no_grad():
        live = peft_model(**inputs)
        loaded = load(save_adapter(peft_model, tmp_path))(**inputs)
    assert live.scale.std() > 1e-3
    torch.testing.assert_close(loaded.logits, live.logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded.scale, live.scale, rtol=0, atol=0)


def test_a_scalar_adapter_starts_with_the_unit_scale(scalar_dir, tmp_path):
    # LoRA around a Bradley–Terry reward model, made by PEFT alone.
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    peft_model = get_peft_model(load_stock(scalar_dir("llama")), config).eval()
    peft_model.save_pretrained(tmp_path)
    inputs = batch(4)
    with torch.no_grad():
        output = load(tmp_path)(**inputs)
        torch.testing.assert_close(output.logits, peft_model(**inputs).logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output.scale, torch.full((4, 1), get_family("normal").unit_scale))


def test_an_adapter_can_be_trained_on(base_model_dir, tmp_path):
    path = save_adapter(lora(load(base_model_dir("llama"))), tmp_path)
    frozen, trainable = load(path), DiscoRewardModel.from_pretrained(path, is_trainable=True)
    assert isinstance(trainable, PeftModel)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    names = {name for name, parameter in trainable.named_parameters() if parameter.requires_grad}
    assert any("lora_A" in name for name in names)
    assert sum(".modules_to_save.default." in name for name in names) == 2  # location and scale


def test_a_prompt_tuning_adapter(base_model_dir, tmp_path):
    model = DiscoRewardModel.from_pretrained(base_model_dir("llama"))
    peft_model = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    randomize_heads(model)
    inputs = batch(1)
    with torch.no_grad():
        live = peft_model(**inputs)
        loaded = load(save_adapter(peft_model, tmp_path))(**inputs)
    assert live.scale.shape == (1, 1)
    torch.testing.assert_close(loaded.logits, live.logits, rtol=0, atol=0)
    torch.testing.assert_close(loaded.scale, live.scale, rtol=0, atol=0)


# 4. How it is loaded


@all_architectures
@pytest.mark.parametrize("source", ["base", "disco"])
def test_bfloat16_keeps_the_head_in_float32(architecture, source, base_model_dir, disco_dir):
    path = {"base": base_model_dir, "disco": disco_dir}[source](architecture)
    model = load(path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in head_of(model).state_dict().values()} == {torch.float32}
    backbone = getattr(model, model.base_model_prefix)
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    inputs = batch(4)
    with torch.no_grad():
        output = model(**inputs)
        assert output.logits.dtype == output.scale.dtype == torch.float32
        if source == "disco":
            exact = load(path)(**inputs)
            torch.testing.assert_close(output.scale.log(), exact.scale.log(), rtol=0, atol=0.1)
            for name, tensor in load_file(f"{path}/model.safetensors").items():
                if name.startswith(model.head_name):
                    assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("asked", "backbone"), [(None, "bfloat16"), ("auto", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")]
)
def test_a_half_precision_reward_model_gets_a_float32_head(asked, backbone, scalar_dir, tmp_path):
    stock = AutoModelForSequenceClassification.from_pretrained(
        scalar_dir("roberta"), num_labels=1, dtype=torch.bfloat16
    )
    stock.save_pretrained(tmp_path)
    model = load(tmp_path, **({} if asked is None else {"dtype": asked}))
    assert model.get_input_embeddings().weight.dtype == getattr(torch, backbone)
    assert {tensor.dtype for tensor in head_of(model).state_dict().values()} == {torch.float32}
    assert torch.equal(head_of(model).weight, stock.classifier.out_proj.weight.float())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "roberta", "deberta_v2", "modernbert"])
@pytest.mark.parametrize("source", ["base", "disco"])
def test_four_bits_leave_the_head_alone(architecture, source, base_model_dir, disco_dir):
    import bitsandbytes

    path = {"base": base_model_dir, "disco": disco_dir}[source](architecture)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load(path, quantization_config=quantization)
    assert quantization.llm_int8_skip_modules is None  # the caller's object is as it was
    quantized = [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(quantized) >= 4
    assert all(name.startswith(f"{model.base_model_prefix}.") for name in quantized)
    head = head_of(model)
    assert type(head) is DiscoHead
    assert type(head.scale) is ScaleHead
    assert {tensor.dtype for tensor in head.state_dict().values()} == {torch.float32}
    # A fresh layer (an encoder's pooler) is initialized and can be trained.
    for name in model.newly_initialized:
        for parameter in model.get_submodule(name).parameters():
            assert parameter.is_floating_point()
            assert torch.isfinite(parameter).all()
    with torch.no_grad():
        output = model(**batch(4))
    assert torch.isfinite(output.logits).all()
    if source == "disco":
        for name, tensor in load_file(f"{path}/model.safetensors").items():
            if name.startswith(model.head_name):
                assert torch.equal(model.state_dict()[name], tensor), name
    else:
        torch.testing.assert_close(output.scale, torch.full((4, 1), get_family("normal").unit_scale))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(architecture, device_map, base_model_dir, disco_dir):
    inputs = batch(4)
    for path in (disco_dir(architecture), base_model_dir(architecture)):
        torch.manual_seed(0)
        expected = load(path)
        torch.manual_seed(0)
        model = load(path, device_map=device_map)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits)
            torch.testing.assert_close(model(**inputs).scale, expected(**inputs).scale)


def test_four_bits_saved_and_loaded_again(disco_dir, tmp_path):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = load(disco_dir("llama"), quantization_config=quantization)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert head_of(again).weight.dtype == torch.float32
    with torch.no_grad():
        output, expected = again(**batch(4)), model(**batch(4))
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.scale, expected.scale)
        torch.testing.assert_close(load_stock(tmp_path)(**batch(4)).logits, expected.logits)


def test_a_subfolder_and_an_attention_implementation(disco_dir, tmp_path):
    load(disco_dir("llama")).save_pretrained(tmp_path / "reward")
    model = load(tmp_path, subfolder="reward", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        expected = load(disco_dir("llama"))(**batch(4))
        torch.testing.assert_close(model(**batch(4)).logits, expected.logits)


def test_a_model_that_also_sees(tmp_path):
    text = tiny_config("gemma3")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.to_dict(),
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=5,
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = randomize_heads(load(tmp_path / "base"))
    model.save_pretrained(tmp_path / "disco")
    with torch.no_grad():
        output = model(**batch(4))
        torch.testing.assert_close(load_stock(tmp_path / "disco")(**batch(4)).logits, output.logits)
        torch.testing.assert_close(load(tmp_path / "disco")(**batch(4)).scale, output.scale)


def test_the_arguments_passed_are_not_changed(base_model_dir):
    config = AutoConfig.from_pretrained(base_model_dir("llama"))
    before = config.to_dict()
    for family in ("normal", "cauchy"):  # twice from one object, as in a sweep
        assert load(base_model_dir("llama"), config=config, reward_family=family).config.num_labels == 1
    assert config.to_dict() == before
