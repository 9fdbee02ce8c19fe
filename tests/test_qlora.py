"""QLoRA: the backbone in 4 bits, the adapter in bfloat16, and the reward head whole and in float32 all the way."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import SCALE_STATE
from tiny_training import disco_trainer, preferences, weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from disco_trl import DiscoRewardModel


bitsandbytes = pytest.importorskip("bitsandbytes")

FOUR_BITS = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def heads(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(trainer.model).items() if ".score." in name}


@pytest.fixture(scope="module")
def wider_llama_dir(tmp_path_factory, tiny_llama_dir) -> str:
    """The tests' tiny Llama, made as wide as the blocks in which bitsandbytes packs weights for the CPU."""
    path = tmp_path_factory.mktemp("wider-llama")
    config = AutoConfig.from_pretrained(tiny_llama_dir, hidden_size=64, intermediate_size=64, head_dim=32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(path)
    return str(path)


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
    )


def test_the_head_keeps_the_float32_values_it_had_before_trl_cast_it(tmp_path, wider_llama_dir, trainer):
    assert FOUR_BITS.llm_int8_skip_modules is None  # the user's object is left alone
    layers = {type(module) for name, module in trainer.model.named_modules() if name.endswith("q_proj.base_layer")}
    assert layers == {bitsandbytes.nn.Linear4bit}
    dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "lora" in name} == {torch.bfloat16}  # TRL's doing
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
    names = ("weight", *(f"scale.{name}" for name in SCALE_STATE))
    assert trained == {f"base_model.model.score.modules_to_save.default.{name}" for name in names}
    for name in trained:
        assert after[name].dtype == torch.float32
        # and not in bfloat16 on the way (a small count is exact there as well)
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
