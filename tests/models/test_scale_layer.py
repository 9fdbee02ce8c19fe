"""What the scale reads with a `scale_layer`: hidden states as transformers counts them, averaged over a text.

The layer is compared with `output_hidden_states=True`, and means with a loop over rows. Stock loading is in contract
C1, PPO itself in `handoff/test_ppo.py`.
"""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from forests import padded, pairs, prefixes_by_place, random_model
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from tiny_models import (
    ARCHITECTURES,
    DECODERS,
    EOS,
    PAD,
    VOCAB,
    batch,
    head_of,
    load,
    lora,
    randomize_heads,
    tiny_config,
)
from tiny_training import disco_trainer, furthest, preferences, weights
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from disco_trl import DiscoReward, DiscoRewardModel
from disco_trl.data.forest import grow_forest, pack
from disco_trl.models import scale_layer
from disco_trl.models.adapters import ADAPTER_SETTINGS_FILE, keep_to_one_family
from disco_trl.models.inference import score
from disco_trl.models.prefix_sharing import _Layout, prepare
from disco_trl.models.scale_layer import default_scale_layer, mean_over_paths, mean_over_tokens, tokens_to_read
from disco_trl.models.upgrade import upgrade


all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def layered(path: str, layer: int | None):
    """A model whose scale reads a layer, with a random head."""
    model = DiscoRewardModel.from_pretrained(path)
    model.set_scale_layer(layer)
    return randomize_heads(model)


def random_layered(model_type: str, layer: int, **more):
    """The same of `forests.random_model`."""
    model = random_model(model_type, **more)
    head_of(model).scale.weight.data.zero_()
    model.set_scale_layer(layer)
    head_of(model).scale.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return model


def by_hand(model, inputs: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """Means of `hidden_states[layer]`, row by row, of shape `(B, H)`."""
    backbone = getattr(model, model.base_model_prefix)
    with torch.no_grad():
        states = backbone(**inputs, output_hidden_states=True).hidden_states[layer]
    means = []
    for ids, mask, row in zip(inputs["input_ids"], inputs["attention_mask"], states, strict=True):
        end = ids.ne(PAD).nonzero().max() + 1 if model.head_name == "score" else len(ids)
        means.append(row[:end][mask[:end].bool()].mean(dim=0))
    return torch.stack(means)


# The states


@all_architectures
@pytest.mark.parametrize("layer", [1, 2])
def test_the_mean_of_the_hidden_states_after_a_layer(architecture, layer, disco_dir, base_model_dir):
    model = layered(base_model_dir(architecture), layer)
    plain = randomize_heads(DiscoRewardModel.from_pretrained(base_model_dir(architecture)))
    plain.load_state_dict(model.state_dict())
    for padding_side in ("right", "left"):
        inputs = batch(4, padding_side)
        expected = by_hand(model, inputs, layer)
        with torch.no_grad():
            output, without = model(**inputs), plain(**inputs)
        torch.testing.assert_close(output.scale_state, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(output.scale, head_of(model).scale(expected), rtol=1e-5, atol=0)
        assert output.scale.log().std() > 1e-2
        assert not output.scale_state.requires_grad
        # The location knows nothing of it.
        assert torch.equal(output.logits, without.logits)
        assert torch.equal(output.pooled_hidden_state, without.pooled_hidden_state)
        assert torch.equal(without.scale_state, without.pooled_hidden_state)
        assert (output.scale - without.scale).abs().max() > 1e-3
        assert torch.equal(model(**inputs, return_dict=False)[-1], output.scale_state)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "bert"])
def test_padding_changes_nothing(architecture, base_model_dir):
    """A text alone, in a batch, and with either side padded. (BERT's positions begin at the left end.)"""
    model = layered(base_model_dir(architecture), 1)
    inputs = batch(4)
    with torch.no_grad():
        together = model(**inputs)
        for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
            ids = inputs["input_ids"][row : row + 1, :length]
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            torch.testing.assert_close(together.scale_state[row], alone.scale_state[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model(input_ids=ids).scale_state, alone.scale_state, rtol=0, atol=0)
        if architecture in ("llama", "gemma2"):  # whose positions are relative
            left = model(**batch(4, "left"))
            torch.testing.assert_close(left.scale_state, together.scale_state, rtol=0, atol=1e-5)


def test_tokens_to_read_by_hand():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
    read = tokens_to_read(mask.shape, mask, torch.tensor([1, 3, 2, 0]), mask.device)
    # Not beyond the last token, not where nothing is attended to, and never nothing at all
    assert read.int().tolist() == [[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]]
    assert tokens_to_read(mask.shape, mask, None, mask.device).int().tolist() == mask.tolist()  # an encoder
    assert tokens_to_read(mask.shape, None, None, mask.device).all()
    # The mask of prefix tuning begins with the prefix, which is not among the tokens.
    prefix = torch.ones(4, 2, dtype=torch.long)
    assert torch.equal(tokens_to_read(mask.shape, torch.cat([prefix, mask], 1), None, mask.device), mask.bool())
    with pytest.raises(ValueError, match=r"attention_mask has 4 dimensions.*shape \(batch, tokens\)"):
        tokens_to_read(mask.shape, torch.ones(4, 1, 4, 4), None, mask.device)


def test_what_is_not_read_may_be_nan():
    states = torch.tensor([[[1.0], [3.0], [float("nan")]], [[2.0], [float("inf")], [float("nan")]]])
    read = torch.tensor([[True, True, False], [True, False, False]])
    assert mean_over_tokens(states, read).tolist() == [[2.0], [2.0]]
    means = scale_layer.running_means(torch.tensor([[[float("nan")], [1.0], [3.0]]]), torch.tensor([[0, 1, 1]]))
    assert means.tolist() == [[[0.0], [1.0], [2.0]]]


def test_means_are_taken_in_float32():
    """In bfloat16 the sum of 1,000 ones and a half would stay at 256."""
    states = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    states[0, 0] = 1.5
    read = torch.ones(1, 1000, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means = [mean_over_tokens(states, read), mean_over_paths(states, read)]
        means.append(scale_layer.running_means(states, None)[:, -1])
    for mean in means:
        assert mean.dtype == torch.float32
        assert mean.item() == pytest.approx(1.0005, abs=1e-6)


# Forests

# Answers to one prompt, an identical text, one that is a prefix of another, one that shares nothing, and two that end
# in padding tokens: their rewards are read before, once within what others share.
PROMPT = [5, 6, 7, 8, 9, 10]
SEQUENCES = [
    [*PROMPT, 11, 12, 13, EOS],
    [*PROMPT, 14, 15, EOS],
    [*PROMPT, 14, 15, EOS],
    [*PROMPT, 14],
    [20, 21, 22, EOS],
    [*PROMPT, PAD, PAD],
    [*PROMPT, 11, PAD, 12, PAD],
    [30],
]
WINDOW = {"sliding_window": 4}
SHARING = {
    "llama": ("llama", {}),
    "mistral, windows": ("mistral", WINDOW),
    "gemma3, some windows": (
        "gemma3_text",
        {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2, "query_pre_attn_scalar": 8},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}),
}


def scales_and_gradients(model, inputs):
    model.zero_grad()
    output = model(**inputs)
    (output.scale.log() * torch.linspace(-1, 1, len(output.scale))[:, None]).sum().backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_a_forest_gives_the_scales_of_padded_rows(name, layer):
    model_type, more = SHARING[name]
    model = random_layered(model_type, layer, **more)
    expected, gradients = scales_and_gradients(model, padded(SEQUENCES))
    assert expected.scale.log().std() > 0.1
    assert prepare(model) is None
    found, shared_gradients = scales_and_gradients(model, pack(SEQUENCES, PAD))
    for field in ("logits", "scale", "scale_state"):
        torch.testing.assert_close(found[field], expected[field], rtol=1e-5, atol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for parameter, gradient in gradients.items():
        assert (shared_gradients[parameter] - gradient).norm() < 1e-4 * torch.maximum(gradient.norm(), 1e-3 * total)
    # The gradient ends at the layer.
    layers = {int(part) for key in gradients for part in key.split(".") if part.isdigit()}
    assert layers == set(range(layer))
    # Scoring takes the same way, in any batches.
    alone = torch.cat([model.reward_distribution(input_ids=torch.tensor([ids])).scale for ids in SEQUENCES])
    for tokens_per_batch in (12, 1000):
        rewards = score(model, SEQUENCES, tokens_per_batch)
        torch.testing.assert_close(rewards.scale, alone.detach(), rtol=1e-5, atol=1e-5)


def test_the_tokens_of_each_sequence_of_a_forest():
    forest, packed = grow_forest(SEQUENCES, PAD), pack(SEQUENCES, PAD)
    prefixes = prefixes_by_place(forest)
    read = _Layout(packed["nodes"]).tokens_up_to(packed["read_at"])
    assert read.shape == (len(SEQUENCES), packed["input_ids"].shape[1])
    assert not read[:, len(prefixes) :].any()  # what fills the row up
    for ids, places, end in zip(SEQUENCES, read, packed["read_at"].tolist(), strict=True):
        found = tuple(packed["input_ids"][0, places].tolist())
        assert found == prefixes[end] == tuple(ids[: len(found)])
        assert set(ids[len(found) :]) <= {PAD}


# How a model is run


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(architecture, layer, use_reentrant, base_model_dir):
    def gradients(model):
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return scales_and_gradients(model, batch(4))

    plain = gradients(layered(base_model_dir(architecture), layer))
    model = layered(base_model_dir(architecture), layer)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    output, found = gradients(model)
    torch.testing.assert_close(output.scale, plain[0].scale)
    assert any("layer" in name or ".h." in name for name in found)
    assert found.keys() == plain[1].keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[1][name], rtol=1e-5, atol=1e-7)


def test_several_threads_score_with_one_model(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    texts = [torch.randint(3, VOCAB, (1, 3 + index % 7)) for index in range(48)]

    def state(ids):
        with torch.no_grad():
            return model(input_ids=ids).scale_state

    expected = list(map(state, texts))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(state, texts))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_an_error_in_the_backbone_leaves_the_model_as_it_was(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        expected = model(input_ids=ids).scale
        for broken in (model, model.model):
            with pytest.raises(IndexError):
                broken(input_ids=torch.tensor([[10**6]]))
            assert scale_layer._READING.get() is None
        assert torch.equal(model(input_ids=ids).scale, expected)
        assert model.as_scalar().score(model.model(input_ids=ids).last_hidden_state).shape == (1, 3, 1)


def test_four_bits(wider_llama_dir):
    pytest.importorskip("bitsandbytes")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = DiscoRewardModel.from_pretrained(wider_llama_dir, quantization_config=quantization, dtype="float32")
    model.set_scale_layer(1)
    model = lora(model)
    texts = [[5, 6, 7, 8], [5, 6, 9]]
    inputs = padded(texts)
    inner = model.get_base_model()
    inner.config.pad_token_id = PAD
    model.train()  # in evaluation bitsandbytes packs the weights for a CPU, which rounds them once more
    output, gradients = scales_and_gradients(model, inputs)
    torch.testing.assert_close(output.scale_state, by_hand(inner, inputs, 1), rtol=1e-5, atol=1e-6)
    assert any("lora_A" in name for name in gradients)
    assert prepare(model) is None
    torch.testing.assert_close(model(**pack(texts, PAD)).scale, output.scale, rtol=1e-5, atol=1e-5)


# Adapters and files


@all_architectures
def test_lora(architecture, base_model_dir, tmp_path):
    model = lora(layered(base_model_dir(architecture), 1))
    output, gradients = scales_and_gradients(model, batch(4))
    torch.testing.assert_close(output.scale_state, by_hand(model.get_base_model(), batch(4), 1), rtol=1e-5, atol=1e-5)
    assert any("lora_A" in name for name in gradients)
    keep_to_one_family(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / ADAPTER_SETTINGS_FILE).read_text())["scale_layer"] == 1
    again = load(tmp_path)
    assert isinstance(again, PeftModel)
    assert again.get_base_model().scale_layer == again.get_base_model().scale_head.layer == 1
    with torch.no_grad():
        torch.testing.assert_close(again(**batch(4)).scale, output.scale, rtol=1e-5, atol=1e-6)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch(4)).scale, output.scale, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(**batch(4)).scale, merged(**batch(4)).scale)


def test_an_adapter_that_reads_another_layer_is_not_let_in(base_model_dir, tmp_path):
    for layer in (1, 2):
        model = lora(layered(base_model_dir("llama"), layer))
        keep_to_one_family(model)
        model.save_pretrained(tmp_path / str(layer))
    model = load(tmp_path / "1")
    with pytest.raises(ValueError, match=r"trained with .*scale_layer=2.*scale_layer=1"):
        model.load_adapter(tmp_path / "2", "other")


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_learned_prompt_counts_in_every_batch(architecture, base_model_dir):
    model = layered(base_model_dir(architecture), 1)
    adapted = get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)).eval()
    randomize_heads(model)
    ids = torch.tensor([[5, 6, 7, 8, 9], [11, 12, PAD, PAD, PAD]])
    with torch.no_grad():
        together = adapted(input_ids=ids, attention_mask=ids.ne(PAD).long())
        alone = adapted(input_ids=ids[1:, :2], attention_mask=torch.ones(1, 2, dtype=torch.long))
    torch.testing.assert_close(together.scale_state[1:], alone.scale_state, rtol=0, atol=1e-6)
    assert together.scale.log().diff(dim=0).abs() > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_a_checkpoint_restores_it(architecture, base_model_dir, tmp_path):
    model = layered(base_model_dir(architecture), 2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["disco"]["scale_layer"] == 2
    for again in (load(tmp_path), upgrade(DiscoRewardModel.from_pretrained(tmp_path)).eval()):
        assert again.scale_layer == again.scale_head.layer == 2
        with torch.no_grad():
            torch.testing.assert_close(again(**batch(4)).scale, model(**batch(4)).scale, rtol=0, atol=0)


def test_a_copy_is_a_model_of_its_own(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    twin = copy.deepcopy(model)
    twin.scale_head.weight.data.zero_()
    twin.set_scale_layer(2)
    randomize_heads(twin)
    for each, layer in ((model, 1), (twin, 2)):
        with torch.no_grad():
            torch.testing.assert_close(each(**batch(4)).scale_state, by_hand(each, batch(4), layer))


def test_a_live_stock_classifier(scalar_dir):
    model = AutoModelForSequenceClassification.from_pretrained(scalar_dir("llama")).eval()
    upgrade(model)
    model.set_scale_layer(1)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch(4)).scale_state, by_hand(model, batch(4), 1))


def test_back_to_the_last_hidden_state(base_model_dir):
    model = DiscoRewardModel.from_pretrained(base_model_dir("llama")).eval()
    before = (copy.deepcopy(model.config.disco), len(model.model._forward_hooks))
    model.set_scale_layer(1)
    model.set_scale_layer(2)
    model.set_scale_layer(None)
    assert (model.config.disco, len(model.model._forward_hooks)) == before
    with torch.no_grad():
        output = model(**batch(4))
    assert torch.equal(output.scale_state, output.pooled_hidden_state)


# What is refused


def test_a_learned_scale_keeps_its_layer(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    model.set_scale_layer(1)  # no change
    for layer in (2, None):
        with pytest.raises(ValueError, match=rf"scale_layer={layer} contradicts .* learned with scale_layer=1"):
            model.set_scale_layer(layer)
    # A constant scale may begin anew. What it knows of the states that it has seen goes.
    model.scale_head.weight.data.zero_()
    model.set_scale_layer(2)
    assert not any(buffer.any() for buffer in model.scale_head.buffers())


def test_a_fixed_scale_reads_nothing(base_model_dir):
    model = DiscoRewardModel.from_pretrained(base_model_dir("llama"), fixed_scale=0.5)
    with pytest.raises(ValueError, match=r"fixed at 0\.5 and reads nothing"):
        model.set_scale_layer(1)
    assert "scale_layer" not in model.config.disco


@pytest.mark.parametrize("layer", [0, -1, 3, 10**9])
def test_a_layer_that_there_is_not(layer, base_model_dir, tmp_path):
    model = DiscoRewardModel.from_pretrained(base_model_dir("llama"))
    model.set_scale_layer(1)
    with pytest.raises(ValueError, match=rf"scale_layer={layer} has to be a whole number from 1 to 2"):
        model.set_scale_layer(layer)
    assert model.scale_layer == model.scale_head.layer == 1  # as it was
    model.config.disco = {**model.config.disco, "scale_layer": layer}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"number of a layer|from 1 to 2, the number of layers"):
        DiscoRewardModel.from_pretrained(tmp_path)


_IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": EOS}
OTHERS = {
    "bart": ("BartForSequenceClassification", {"d_model": 32, "decoder_start_token_id": EOS}, "an encoder and those"),
    "albert": ("AlbertForSequenceClassification", {"hidden_size": 32, "embedding_size": 8}, "no single list"),
    "xlnet": ("XLNetForSequenceClassification", {"d_model": 32, "summary_type": "first"}, "no single list"),
    "opt": ("OPTForSequenceClassification", {"hidden_size": 32, "word_embed_proj_dim": 16}, "size 32, .* reads 16"),
}
_SMALL = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "num_attention_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size", "d_inner", "ffn_dim"), 32),
}


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_have_none(name):
    architecture, more, message = OTHERS[name]
    config_class = transformers.AutoConfig.for_model(name).__class__
    known = {key for key in _SMALL if hasattr(config_class(), key)}
    config = config_class(**_IDS, **{key: _SMALL[key] for key in known}, **more, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config)
    upgrade(model)
    with pytest.raises(ValueError, match=rf"{architecture} cannot have a scale_layer: .*{message}"):
        model.set_scale_layer(1)
    assert model.scale_layer is None
    assert default_scale_layer(model.config) == (1 if name == "opt" else None)


def test_layers_that_are_not_called_or_hold_something_else(base_model_dir):
    class Fused(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **kwargs):
            return self.layer(hidden_states.repeat(2, 1, 1), **kwargs)[:1]

    model = layered(base_model_dir("llama"), 1)
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    model.model.layers[1] = Fused(model.model.layers[1])  # the hook is within, where it sees two rows
    with pytest.raises(ValueError, match=r"after layer 1.* of shape \(2, 3, 64\), where \(1, 3, 64\) was expected"):
        model(**inputs)
    model.model.layers[1] = Fused(torch.nn.Identity())
    model.model.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ValueError, match=r"after layer 1.*did not come by.*cannot have a scale_layer"):
        model(**inputs)


def test_a_head_is_not_given_the_wrong_states(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    with pytest.raises(ValueError, match=r"the scale reads layer 1 .* needs scale_states"):
        model.reward_head(torch.zeros(2, 64), full_output=True)
    assert model.score(torch.zeros(2, 64)).shape == (2, 1)  # the location needs none


# The default


@pytest.mark.parametrize(("layers", "expected"), [(1, 1), (2, 1), (3, 2), (12, 8), (28, 19), (30, 20)])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_default(architecture, layers, expected):
    name = "n_layer" if architecture == "gpt2" else "num_hidden_layers"
    assert default_scale_layer(tiny_config(architecture, **{name: layers})) == expected


# A backbone that is called by itself


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("layer", [1, 2])
def test_at_every_token(architecture, layer, base_model_dir):
    """The reward at a token is that of the text that ends there."""
    model = layered(base_model_dir(architecture), layer)
    scalar = model.as_scalar("lower_bound", k=2.0)
    backbone = getattr(scalar, scalar.base_model_prefix)
    for padding_side in ("right", "left"):
        inputs = batch(3, padding_side)
        with torch.no_grad():
            output = backbone(**inputs, output_hidden_states=True)
            scores = scalar.score(output.hidden_states[-1])
            assert torch.equal(scores, scalar.score(output.last_hidden_state))
            whole = scalar(**inputs).logits
            last = inputs["input_ids"].ne(PAD).long().mul(torch.arange(9)).argmax(dim=1)
            torch.testing.assert_close(scores[torch.arange(3), last], whole, rtol=1e-5, atol=1e-5)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with torch.no_grad():
        scores = scalar.score(backbone(**inputs).last_hidden_state)
        for length in range(1, 6):
            text = model.reward_distribution(input_ids=inputs["input_ids"][:, :length])
            assert scores[0, length - 1, 0].item() == pytest.approx((text.location - 2 * text.scale).item(), abs=1e-5)


def test_states_and_hidden_states_are_of_one_call(base_model_dir):
    model = layered(base_model_dir("llama"), 1)
    scalar = model.as_scalar("lower_bound", k=2.0)
    with torch.no_grad():
        one, other = (scalar.model(input_ids=torch.tensor([ids])).last_hidden_state for ids in ([5, 6, 7], [9, 8, 7]))
        expected = scalar(input_ids=torch.tensor([[5, 6, 7]])).logits
        # The call in between does not matter.
        torch.testing.assert_close(scalar.score(one)[:, -1], expected, rtol=1e-5, atol=1e-5)
        for wrong in (one.clone(), one[:, -1:], other + 0, torch.zeros(1, 3, 64)):
            with pytest.raises(ValueError, match=r"scale_layer.* do not come with this tensor"):
                scalar.score(wrong)
        # The forward of the whole model hands none on.
        states = model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states[-1]
        with pytest.raises(ValueError, match="do not come with this tensor"):
            scalar.score(states)


# Training and hand-off


@pytest.mark.parametrize("prefix_sharing", [True, False])
@pytest.mark.parametrize("peft", [False, True])
def test_training(prefix_sharing, peft, tiny_llama_dir, tmp_path):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    model.set_scale_layer(1)
    trainer = disco_trainer(
        tmp_path,
        model=model,
        train_dataset=preferences(),
        prefix_sharing=prefix_sharing,
        peft_config=LoraConfig(r=2) if peft else None,
        learning_rate=1e-2,
        calibrate=False,
        scale_training="joint",
    )
    seen = []
    track = trainer._reward_model.scale_head.track

    def watch(states, *args, **kwargs):
        seen.append(states)
        return track(states, *args, **kwargs)

    trainer._reward_model.scale_head.track = watch
    trainer.train()
    trainer.save_model()
    head = trainer._reward_model.scale_head
    assert head.weight.any()
    # 32 rows of 512: they weigh nearly the same.
    torch.testing.assert_close(head.mean_hidden, torch.cat(seen).mean(dim=0), rtol=0.1, atol=0.01)
    again = DiscoRewardModel.from_pretrained(tmp_path)
    texts = [[5, 6, 7, 8], [9, 10]]
    torch.testing.assert_close(score(again, texts).scale, score(trainer.model, texts).scale, rtol=1e-5, atol=0)


def test_shared_prefixes_train_the_same_model(tiny_tokenizer, tmp_path):
    tiny_tokenizer.pad_token_id = PAD
    ends = []
    for prefix_sharing in (True, False):
        trainer = disco_trainer(
            tmp_path,
            model=random_layered("llama", 2),
            processing_class=tiny_tokenizer,
            train_dataset=pairs(16),
            prefix_sharing=prefix_sharing,
            optim="sgd",
            learning_rate=0.02,
            calibrate=False,
            scale_training="joint",
        )
        start = weights(trainer.model)
        trainer.train()
        assert trainer.data_collator.share_prefixes == prefix_sharing
        ends.append(weights(trainer.model))
    assert (ends[0]["score.scale.weight"] - start["score.scale.weight"]).abs().max() > 1e-3
    assert furthest(*ends) < 1e-4 * max(furthest(ends[0], start), 1)


def test_a_reward_function_compares_what_the_scale_reads(tiny_llama_dir, tiny_tokenizer):
    model = layered(tiny_llama_dir, 1)
    reward = DiscoReward(model, processing_class=tiny_tokenizer)
    head = model.scale_head
    for buffer in head.buffers():
        buffer.zero_()
    prompts, answers = ["the answer ", "people ", "a film "], ["is short", "like this film", "day"]
    output = [model(input_ids=torch.tensor([ids])) for ids in reward.tokenize(prompts, answers)]
    states, locations = (torch.cat([each[name] for each in output]) for name in ("scale_state", "logits"))
    head.track(states, locations.detach())
    metrics = {}
    reward(prompts, answers, log_metric=metrics.__setitem__)
    for name in ("location", "scale", "distance"):  # of the very rows that it was trained on
        assert metrics[f"disco_mean/shift/{name}"] == pytest.approx(0, abs=1e-3)
    assert reward([], []) == []
