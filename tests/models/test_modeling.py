"""A live model: precision, copies, errors, and rarer architectures; whole models are in contracts C1, C2 and C6."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tiny_models import EOS, VOCAB, load, load_stock, randomize_heads
from tiny_training import bradley_terry_trainer, disco_trainer, furthest, logged, reward_trainer, weights

from disco_trl import DiscoRewardModel


def test_autocast_leaves_location_and_scale_in_float32(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**inputs)
    assert output.logits.dtype == output.scale.dtype == torch.float32


def test_a_copy_is_a_model_of_its_own(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        twin.score.scale.weight.copy_(twin(**inputs).pooled_hidden_state)
        scales = [each(**inputs).scale.item() for each in (model, twin)]
    assert isinstance(twin, DiscoRewardModel)
    assert scales[1] > 2 * scales[0]


def test_an_error_in_the_backbone_leaves_the_head_as_it_was(tiny_llama_dir):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir).eval()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    assert model.score(torch.zeros(2, 16)).shape == (2, 1)
    assert model(input_ids=torch.tensor([[5]])).logits.shape == (1, 1)


# Encoder-decoders, and encoders whose head has another name

_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": EOS}
_T5 = {**_IDS, "d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
_BART = {
    **_IDS,
    "d_model": 32,
    "decoder_start_token_id": EOS,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}
_FLAUBERT = {**_IDS, "emb_dim": 32, "n_layers": 1, "n_heads": 2, "pad_index": 0, "eos_index": EOS}
_FUNNEL = {**_IDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 32}
RARER = {
    "t5": ("T5ForConditionalGeneration", _T5),
    "umt5": ("UMT5ForConditionalGeneration", _T5),
    "bart": ("BartForConditionalGeneration", _BART),
    "flaubert": ("FlaubertWithLMHeadModel", _FLAUBERT),
    "xlm": ("XLMWithLMHeadModel", _FLAUBERT),
    "funnel": ("FunnelForMaskedLM", _FUNNEL),
}
IDS = torch.tensor([[5, 6, 7, 8, EOS], [9, 10, EOS, 0, 0]])
MASK = IDS.ne(0).long()
PAIRS = Dataset.from_list([{"chosen_ids": [5 + i, 6, 7, EOS], "rejected_ids": [8, 9 + i, EOS]} for i in range(4)])


@pytest.fixture(scope="module", params=RARER)
def rarer_dir(request, tmp_path_factory) -> str:
    class_name, sizes = RARER[request.param]
    model_class = getattr(transformers, class_name)
    path = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model_class(model_class.config_class(**sizes)).save_pretrained(path)
    return str(path)


def test_a_rarer_architecture_is_a_scalar_model_to_others(rarer_dir, tmp_path):
    model = randomize_heads(load(rarer_dir))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        together = model(input_ids=IDS, attention_mask=MASK)
        alone = model(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3])
        stock = load_stock(tmp_path)(input_ids=IDS, attention_mask=MASK)
        again = load(tmp_path)(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(stock.logits, together.logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.logits, together.logits[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone.scale, together.scale[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again.scale, together.scale, rtol=1e-6, atol=1e-6)
    assert (together.logits[0] - together.logits[1]).abs() > 1e-3


def test_it_is_trained_as_by_trl(rarer_dir, tmp_path, tiny_tokenizer):
    trainers, starts = [], []
    for build in (bradley_terry_trainer, reward_trainer):
        arguments = {"model": rarer_dir, "train_dataset": PAIRS, "processing_class": tiny_tokenizer}
        trainer = build(tmp_path, max_steps=2, **arguments)
        starts.append(weights(trainer.model))
        trainer.train()
        trainers.append(trainer)
    assert furthest(*starts) == 0
    ours, theirs = ([entry["loss"] for entry in logged(trainer, "loss") if entry] for trainer in trainers)
    assert ours == pytest.approx(theirs, abs=1e-4) and len(ours) == 2


def test_its_adapter_holds_its_head(rarer_dir, tmp_path, tiny_tokenizer):
    trainer = disco_trainer(
        tmp_path,
        model=rarer_dir,
        train_dataset=PAIRS,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
        learning_rate=1e-2,
    )
    trainer.train()
    trainer.save_model()
    loaded = load(tmp_path)
    with torch.no_grad():
        ours, theirs = (
            model.eval()(input_ids=IDS, attention_mask=MASK, return_dict=True) for model in (trainer.model, loaded)
        )
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=0, atol=1e-5)
