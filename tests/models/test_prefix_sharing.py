"""Prefix sharing gives what the sequences give by themselves: the architectures, and who is refused.

Training with it is in `test_prefix_sharing_training.py`, on several processes in `test_prefix_sharing_processes.py`.
"""

import copy
import gc
import json
import re

import pytest
import torch
from forests import padded, prefixes_by_place, random_model
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from tiny_models import EOS, PAD, VOCAB, load, lora, tiny_config
from transformers import AutoModelForSequenceClassification

from disco_trl import RewardDistribution
from disco_trl.data.forest import Nodes, grow_forest, pack
from disco_trl.models import prefix_sharing
from disco_trl.models.inference import score
from disco_trl.models.prefix_sharing import prepare
from disco_trl.models.upgrade import upgrade


# Architectures

# Shorter than the prompts, and than most answers
WINDOW = {"sliding_window": 4}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
# name: (model type, what it has beyond the sizes)
ARCHITECTURES = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window on some layers": (
        "qwen2",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", WINDOW),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**MIXED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", {**MIXED, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "phi3 with a window": ("phi3", WINDOW),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {**WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
WINDOWED = {name for name, (_, more) in ARCHITECTURES.items() if "sliding_window" in more}
CASES = [
    (name, implementation)
    for name in ARCHITECTURES
    for implementation in ("sdpa", "eager")
    if (name, implementation) != ("gemma2", "sdpa")  # its soft cap is not in torch's attention
]
every_architecture = pytest.mark.parametrize(("name", "implementation"), CASES)


def model_of(name: str, implementation: str):
    model_type, more = ARCHITECTURES[name]
    return random_model(model_type, implementation, **more)


def _sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    prompt, other = tokens(11), tokens(3)
    answers = [[*prompt, *tokens(length), EOS] for length in (7, 3, 9, 1)]
    answers += [[*other, *tokens(length), EOS] for length in (2, 8)]
    turns = [tokens(6)]
    for length in (5, 2, 9):
        turns.append([*turns[-1], EOS, *tokens(length)])
    return [*answers, *turns, answers[2], tokens(13), [*prompt, PAD, PAD]]


# Four and two answers to a prompt; a conversation at four turns, each the beginning of the next; a repetition; one
# that shares nothing; and one whose reward is read before its end.
SEQUENCES = _sequences()


def learn(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """log P of each two neighbours among the sequences, `[N - 1]`, and what its mean is to every parameter."""
    model.zero_grad()
    reward = model.reward_distribution(**batch)
    log_probs = RewardDistribution(reward.location[:-1], reward.scale[:-1], "normal").log_prob_greater(
        RewardDistribution(reward.location[1:], reward.scale[1:], "normal")
    )
    (-log_probs.mean()).backward()
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return log_probs.detach(), gradients


def differences(found, expected) -> tuple[float, float]:
    """The largest between log-probabilities, and between gradients, by parameter and relative to its gradient.

    A bias of keys has none but rounding (softmax takes it out again), so none counts as smaller than a thousandth of
    all together.
    """
    (log_probs, gradients), (plain_log_probs, plain_gradients) = found, expected
    assert gradients.keys() == plain_gradients.keys()
    total = torch.stack([gradient.norm() for gradient in plain_gradients.values()]).norm()
    furthest = max(
        ((gradients[name] - gradient).norm() / torch.maximum(gradient.norm(), 1e-3 * total)).item()
        for name, gradient in plain_gradients.items()
    )
    return (log_probs - plain_log_probs).abs().max().item(), furthest


@every_architecture
def test_log_probabilities_and_gradients_are_those_of_padded_rows(name, implementation):
    model = model_of(name, implementation)
    expected = learn(model, padded(SEQUENCES))
    assert expected[0].std() > 0.1
    assert prepare(model) is None
    log_prob, gradient = differences(learn(model, pack(SEQUENCES, PAD)), expected)
    assert log_prob < 1e-5
    assert gradient < 1e-4
    # Rows go the way they went, to the last bit.
    assert differences(learn(model, padded(SEQUENCES)), expected) == (0, 0)


@every_architecture
def test_answers_to_one_prompt_and_turns_of_a_conversation_score_as_each_alone(name, implementation):
    model = model_of(name, implementation)
    with torch.no_grad():
        alone = [model.reward_distribution(input_ids=torch.tensor([ids])) for ids in SEQUENCES]
    # 30 tokens hold two or three of them.
    for tokens_per_batch in (30, 1000):
        rewards = score(model, SEQUENCES, tokens_per_batch=tokens_per_batch)
        assert prepare(model) is None
        torch.testing.assert_close(rewards.location, torch.cat([r.location for r in alone]), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rewards.scale, torch.cat([r.scale for r in alone]), rtol=1e-5, atol=1e-5)


@every_architecture
def test_a_forest_that_is_wrong_shows(name, implementation, monkeypatch):
    """By the same measure, and far above rounding: each fault that the tests above would have to find."""
    model = model_of(name, implementation)
    expected = learn(model, padded(SEQUENCES))
    assert prepare(model) is None
    batch = pack(SEQUENCES, PAD)
    lengths, parents = batch["nodes"].lengths, batch["nodes"].parents
    chain = [parent if parent < 0 else node - 1 for node, parent in enumerate(parents)]
    faults = {
        "positions go on along the row": {"position_ids": torch.arange(batch["input_ids"].shape[1])[None]},
        "positions are one off": {"position_ids": (batch["position_ids"] - 1).clamp_min(0)},
        "answers do not see the prompt": {"nodes": Nodes(lengths, [-1] * len(parents))},
        "answers see each other": {"nodes": Nodes(lengths, chain)},
        "rewards are read one token early": {"read_at": batch["read_at"] - 1},
    }
    for fault, wrong in faults.items():
        log_prob, gradient = differences(learn(model, {**batch, **wrong}), expected)
        assert log_prob > 1e-3, fault
        assert gradient > 1e-2, fault

    right = prefix_sharing._Layout.mask
    if name in WINDOWED:
        for fault, shift in (("one token more", 1), ("one token less", -1)):
            with monkeypatch.context() as patch:
                patch.setattr(
                    prefix_sharing._Layout,
                    "mask",
                    lambda self, node, window, device, shift=shift: right(
                        self, node, window if window is None else window + shift, device
                    ),
                )
                assert differences(learn(model, batch), expected)[0] > 1e-3, fault


@every_architecture
def test_prepare_finds_out_by_itself(name, implementation, monkeypatch):
    """An architecture for which attention along the paths were not the same thing would be refused."""

    def all_visible(self, node, window, device):
        return torch.ones(self.lengths[node], self.path_lengths[node], dtype=torch.bool, device=device)

    model = model_of(name, implementation)
    monkeypatch.setattr(prefix_sharing._Layout, "mask", all_visible)
    assert "the same hidden states in both ways" in prepare(model)
    assert model.config._attn_implementation == implementation


def test_what_fills_the_row_up_disturbs_nobody():
    model = model_of("llama", "sdpa")
    assert prepare(model) is None
    with torch.no_grad():
        exact, filled = (model(**pack(SEQUENCES, PAD, pad_to_multiple_of=size)).logits for size in (1, 500))
    torch.testing.assert_close(filled, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bfloat16_is_as_near_as_bfloat16(implementation):
    """
    Under autocast, with paths on both sides of the length to which a CPU attends in float32.

    The eight rewards of one model are too few: over 32 models the ratio of their mean errors is anything between 0.6
    and 1.8. The mean over eight models is within 1.0 and 1.1.
    """
    prompts = [SEQUENCES[-2] * repeats for repeats in (2, 30)]
    sequences = [[*prompt, *ids] for prompt in prompts for ids in SEQUENCES[:4]]
    errors = []
    for seed in range(8):
        model = random_model("qwen3", implementation, seed, max_position_embeddings=512)
        assert prepare(model) is None
        with torch.no_grad():
            exact = model(**padded(sequences)).logits
            with torch.autocast("cpu", dtype=torch.bfloat16):
                plain, shared = model(**padded(sequences)).logits, model(**pack(sequences, PAD)).logits
        assert exact.std() > 0.1
        errors.append([(rewards - exact).abs().mean() for rewards in (plain, shared)])
    of_plain, of_shared = torch.tensor(errors).mean(dim=0)
    assert of_shared < 1.5 * of_plain


def test_places_and_bounds_for_a_kernel_that_takes_all_paths_at_once():
    batch = pack(SEQUENCES, PAD)
    layout = prefix_sharing._Layout(batch["nodes"])
    places, starts, key_starts = layout.varlen(torch.device("cpu"))
    prefixes = prefixes_by_place(grow_forest(SEQUENCES, PAD))
    for node in range(len(layout.lengths)):
        last = int(starts[node + 1]) - 1
        if last < len(prefixes):  # what fills the row up is no prefix
            keys = batch["input_ids"][0, places[key_starts[node] : key_starts[node + 1]]]
            assert tuple(keys.tolist()) == prefixes[last]
    assert key_starts[-1] == len(places)
    assert starts[-1] == batch["input_ids"].shape[1]


# Adapters


def test_an_adapter_takes_forests_too():
    model = lora(model_of("llama", "sdpa"))
    inner = model.get_base_model()
    expected = learn(inner, padded(SEQUENCES))
    assert any("lora_A" in name for name in expected[1])
    assert prepare(model) is None
    log_prob, gradient = differences(learn(inner, pack(SEQUENCES, PAD)), expected)
    assert log_prob < 1e-5
    assert gradient < 1e-4
    with torch.no_grad():
        through_peft = model(**pack(SEQUENCES, PAD)).logits
        torch.testing.assert_close(through_peft, inner(**pack(SEQUENCES, PAD)).logits, rtol=0, atol=1e-6)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**pack(SEQUENCES, PAD)).logits, through_peft, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_an_adapter_with_tokens_of_its_own_is_refused(config):
    model = get_peft_model(random_model("llama"), config(task_type="SEQ_CLS", num_virtual_tokens=3))
    assert "tokens of its own" in prepare(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_adapter_is_asked_for_itself():
    """Whatever the model was found to be without it."""
    model = random_model("llama")
    assert prepare(model) is None
    assert prepare(get_peft_model(model, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))) is not None


# Who is refused

ALIBI = {"n_layer": 2, "n_head": 4}
LOCAL = {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": 4}
REFUSED = {
    "bert": ({}, "not a disco model on a decoder"),
    "roberta": ({}, "not a disco model on a decoder"),
    "modernbert": ({"cls_token_id": 1, "sep_token_id": EOS}, "not a disco model on a decoder"),
    "qwen3_next": ({}, "its layers .*linear_attention.* are not all of attention"),
    "bloom": (ALIBI, "does not take a forest for an attention mask"),
    "gpt_neo": (LOCAL, "does not take a forest for an attention mask"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_model_that_cannot_is_left_as_it_was_and_scored_by_rows(model_type):
    more, reason = REFUSED[model_type]
    model = random_model(model_type, None, **more)
    implementation = model.config._attn_implementation
    with torch.no_grad():
        alone = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in SEQUENCES]
        expected = torch.cat([model(**inputs).logits[0] for inputs in alone])
    refusal = prepare(model)
    assert refusal is not None
    assert re.search(reason, refusal)
    assert prepare(model) == refusal
    assert model.config._attn_implementation == implementation
    rewards = score(model, SEQUENCES, tokens_per_batch=60)
    torch.testing.assert_close(rewards.location, expected, rtol=1e-5, atol=1e-5)


def test_a_stock_model_is_scored_by_rows():
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)).eval()
    assert "not a disco model" in prepare(model)
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])
    torch.testing.assert_close(score(model, SEQUENCES).location, expected, rtol=1e-5, atol=1e-5)


def test_an_attention_that_compiles_is_refused():
    model = random_model("llama")
    model.set_attn_implementation("flex_attention")
    assert "'flex_attention', not one of eager, sdpa" in prepare(model)
    assert model.config._attn_implementation == "flex_attention"


def test_a_window_that_the_config_does_not_tell_of_is_refused():
    """It need not be shorter than the few tokens of the trial to be found."""
    model = random_model("llama")
    for layer in model.model.layers[1:]:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "sliding_window": 1000}), with_kwargs=True
        )
    assert "do not all attend" in prepare(model)


# What it leaves behind


@pytest.fixture
def prepared():
    model = random_model("llama")
    assert prepare(model) is None
    return model


def test_prepare_takes_no_random_numbers_and_changes_no_weight():
    model = random_model("gpt2").train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert prepare(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_checkpoint_does_not_tell(prepared, tmp_path):
    prepared.save_pretrained(tmp_path)
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()
    assert "attn_implementation" not in json.dumps(prepared.config.to_dict())
    loaded = load(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert torch.equal(loaded(**padded(SEQUENCES)).logits, prepared(**padded(SEQUENCES)).logits)


def test_a_copy_is_ready_as_well(prepared):
    twin = copy.deepcopy(prepared)
    assert prepare(twin) is None
    with torch.no_grad():
        assert torch.equal(twin(**pack(SEQUENCES, PAD)).logits, prepared(**pack(SEQUENCES, PAD)).logits)


def test_a_model_from_its_config(prepared):
    """It comes with the name of the attention, and has to be asked itself."""
    other = AutoModelForSequenceClassification.from_config(prepared.config).eval()
    with torch.no_grad():
        rows = upgrade(other).reward_distribution(**padded(SEQUENCES))
    torch.testing.assert_close(score(other, SEQUENCES).location, rows.location, rtol=1e-5, atol=1e-5)
    assert prepare(other) is None


def test_another_attention_afterwards(prepared):
    with torch.no_grad():
        expected = prepared(**padded(SEQUENCES)).logits
        prepared.set_attn_implementation("eager")
        assert prepare(prepared) is None
        assert prepared.config._attn_implementation == "shared_prefix_eager"
        torch.testing.assert_close(prepared(**pack(SEQUENCES, PAD)).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_generator_with_the_same_backbone(prepared):
    """Steps of one token against a cache, a mask of two dimensions, a mask of four: all as without."""
    stock = copy.deepcopy(prepared)
    stock.set_attn_implementation("sdpa")
    batch = padded(SEQUENCES)
    with torch.no_grad():
        for inputs in (batch, {"input_ids": batch["input_ids"][:1]}):
            ours, theirs = (model.model(**inputs, use_cache=True) for model in (prepared, stock))
            assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
            step = {"input_ids": inputs["input_ids"][:, -1:], "use_cache": True}
            next_ours = prepared.model(**step, past_key_values=ours.past_key_values).last_hidden_state
            next_theirs = stock.model(**step, past_key_values=theirs.past_key_values).last_hidden_state
            assert torch.equal(next_ours, next_theirs)


def test_layouts_do_not_pile_up(prepared):
    def layouts() -> int:
        gc.collect()
        return sum(isinstance(thing, prefix_sharing._Layout) for thing in gc.get_objects())

    before = layouts()
    for _ in range(3):
        learn(prepared, pack(SEQUENCES, PAD))
    assert layouts() == before


def test_no_other_model_is_touched(prepared):
    assert random_model("llama").config._attn_implementation == "sdpa"
