"""QLoRA: a backbone in 4 bits, an adapter in bfloat16, and an unquantized reward head that stays in float32."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import MOMENTS
from tiny_training import disco_trainer, preferences, weights
from transformers import BitsAndBytesConfig

from disco_trl import DiscoRewardModel


bitsandbytes = pytest.importorskip("bitsandbytes")

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
EIGHT_BITS = BitsAndBytesConfig(load_in_8bit=True)


def heads(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(trainer.model).items() if ".score." in name}


@pytest.fixture
def trainer(tmp_path, wider_llama_dir):
    return disco_trainer(
        tmp_path,
        model=wider_llama_dir,
        train_dataset=preferences(),
        quantization_config=FOUR_BITS,
        peft_config=LoraConfig(target_modules="all-linear"),
        gradient_checkpointing=True,
        bf16=True,
        scale_training="joint",
        calibrate=False,
    )


def test_the_head_keeps_the_float32_values_it_had_before_trl_cast_it(tmp_path, wider_llama_dir, trainer):
    assert FOUR_BITS.llm_int8_skip_modules is None  # the user's configuration is not modified
    layers = {type(module) for name, module in trainer.model.named_modules() if name.endswith("q_proj.base_layer")}
    assert layers == {bitsandbytes.nn.Linear4bit}
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.bfloat16}  # TRL casts them
    assert {tensor.dtype for tensor in heads(trainer).values()} == {torch.float32}

    plain = disco_trainer(tmp_path, model=wider_llama_dir, train_dataset=preferences())
    for name, tensor in heads(trainer).items():
        if name.endswith("score.modules_to_save.default.weight"):
            assert torch.equal(tensor, plain.model.score.weight)
            assert not torch.equal(tensor, tensor.bfloat16().float())
            break
    else:
        pytest.fail("no head is trained")


def test_the_head_is_trained_in_float32_and_saved(tmp_path, trainer):
    before = heads(trainer)
    trainer.train()
    after = heads(trainer)
    trained = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    names = ("weight", "scale.weight", *(f"scale.{name}" for name in MOMENTS))
    assert trained == {f"base_model.model.score.modules_to_save.default.{name}" for name in names}
    for name in trained:
        assert after[name].dtype == torch.float32
        # The values have not been rounded to bfloat16 on the way. (A small count is exact in bfloat16 as well.)
        assert name.endswith("rows_seen") or not torch.equal(after[name], after[name].bfloat16().float())

    trainer.save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32", quantization_config=FOUR_BITS).eval()
    assert {module.weight.dtype for _, module in loaded.get_base_model().named_reward_heads()} == {torch.float32}
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        outputs = [model.eval()(**batch) for model in (trainer.model, loaded)]
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-3)
    assert torch.allclose(outputs[0].scale, outputs[1].scale, atol=1e-3)


def test_a_quantized_peft_model(tmp_path, wider_llama_dir, tiny_tokenizer):
    base = DiscoRewardModel.from_pretrained(wider_llama_dir, dtype="float32", quantization_config=FOUR_BITS)
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
    before = {name: head.weight.detach().clone() for name, head in base.named_reward_heads()}
    trainer = disco_trainer(tmp_path, model=model, train_dataset=preferences(), processing_class=tiny_tokenizer)
    for name, head in base.named_reward_heads():
        assert torch.equal(head.weight, before[name])
        assert head.weight.dtype == torch.float32
    trainer.train()
    assert {tensor.dtype for tensor in heads(trainer).values()} == {torch.float32}
    assert not torch.equal(base.score.modules_to_save["default"].weight, before["score.modules_to_save.default"])


# Other quantizations and other adapters, which PEFT supports without changes

IN_8, IN_4 = (EIGHT_BITS, bitsandbytes.nn.Linear8bitLt), (FOUR_BITS, bitsandbytes.nn.Linear4bit)
VARIANTS = {
    "8 bits": (*IN_8, {}),
    "8 bits, rsLoRA": (*IN_8, {"use_rslora": True}),
    "4 bits, DoRA": (*IN_4, {"use_dora": True}),
    "4 bits, rsLoRA": (*IN_4, {"use_rslora": True}),
    "DoRA": (None, torch.nn.Linear, {"use_dora": True}),
    "rsLoRA": (None, torch.nn.Linear, {"use_rslora": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_come_back(variant, tmp_path, wider_llama_dir):
    quantization, layer, options = VARIANTS[variant]
    trainer = disco_trainer(
        tmp_path,
        model=wider_llama_dir,
        train_dataset=preferences(),
        quantization_config=quantization,
        peft_config=LoraConfig(r=4, target_modules="all-linear", **options),
        learning_rate=1e-2,
        scale_training="joint",
        calibrate=False,
    )
    config = trainer.model.peft_config["default"]
    assert {name: getattr(config, name) for name in options} == options
    layers = {type(module) for name, module in trainer.model.named_modules() if name.endswith("base_layer")}
    assert layers == {layer}

    before = weights(trainer.model)
    trainer.train()
    changed = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    for part in ("lora_A", "lora_B", "score.modules_to_save.default.weight", "scale.weight"):
        assert any(part in name for name in changed), part
    if options.get("use_dora"):
        assert any("lora_magnitude_vector" in name for name in changed)
    assert {tensor.dtype for tensor in heads(trainer).values()} == {torch.float32}

    trainer.save_model()
    loaded = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32", quantization_config=quantization).eval()
    assert {module.weight.dtype for _, module in loaded.get_base_model().named_reward_heads()} == {torch.float32}
    batch = {"input_ids": torch.arange(12).reshape(2, 6) + 5}
    with torch.no_grad():
        outputs = [model.eval()(**batch) for model in (trainer.model, loaded)]
    # TRL keeps the adapter of a quantized base in bfloat16, and it is loaded in float32.
    tolerance = 1e-6 if quantization is None else 1e-2
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=tolerance)
    torch.testing.assert_close(outputs[0].scale, outputs[1].scale, rtol=0, atol=tolerance)
    assert outputs[1].logits.std() > 10 * tolerance
