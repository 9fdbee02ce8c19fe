"""`DiscoReward`: the tokens that it reads, the rewards that it gives, and what it is made of.

TRL's trainers use it in `tests/handoff`.
"""

import copy
import json
import math
from statistics import NormalDist

import pytest
import torch
from reward_rows import COMPLETIONS, PROMPTS, assistant, close, distribution_of, user
from tiny_models import load, load_stock, lora, save_adapter
from transformers import AutoTokenizer

from disco_trl import DiscoReward, DiscoRewardModel, best_of_n
from disco_trl.distributions.transforms import TRANSFORMS
from disco_trl.rewards.reward_function import prompt_key


TOOL = {"type": "function", "function": {"name": "search", "description": "Look it up.", "parameters": {}}}


# Tokens


def expected_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_texts_get_their_end(reward_dir):
    reward = DiscoReward(reward_dir())
    tokenizer = reward.processing_class
    ids = reward.tokenize(["Who? ", "Who? "], ["people", "people<|im_end|>"])
    assert ids == [expected_ids(tokenizer, "Who? people<|im_end|>")] * 2


def test_conversations_go_through_the_chat_template(reward_dir):
    reward = DiscoReward(reward_dir())
    ids = reward.tokenize([user("Who?")], [assistant("people")])
    text = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\npeople<|im_end|>\n"
    assert ids == [expected_ids(reward.processing_class, text)]


@pytest.mark.parametrize("as_json", [False, True])
def test_each_row_has_its_tools_and_template_arguments(as_json, reward_dir, tiny_tokenizer):
    tiny_tokenizer.chat_template = (
        "{{ tools | map(attribute='function.name') | join if tools else 'no tools' }}|{{ style }}|"
        "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    )
    reward = DiscoReward(reward_dir(), tiny_tokenizer)
    tools = [[TOOL], None]
    ids = reward.tokenize(
        [user("Who?")] * 2,
        [assistant("people")] * 2,
        tools=[json.dumps(row) for row in tools] if as_json else tools,
        chat_template_kwargs=[{"style": "short"}, None],
        answer=["people", "nobody"],
    )
    texts = ["search|short|Who?|people|", "no tools||Who?|people|"]
    assert ids == [expected_ids(tiny_tokenizer, text) for text in texts]


def test_what_trl_passes_beside_is_let_be(reward_dir):
    reward = DiscoReward(reward_dir())
    plain = reward(prompts=PROMPTS, completions=COMPLETIONS)
    beside = {
        "completion_ids": [[1]] * 6,
        "trainer_state": object(),
        "environments": [object()] * 6,
        "answer": [None] * 6,
        "tools": None,
        "log_extra": None,
        "log_metric": None,
    }
    assert reward(prompts=PROMPTS, completions=COMPLETIONS, **beside) == plain


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        (["a", "b"], ["c"], "2 prompts but 1 completions"),
        (["a", user("b")], ["c", "d"], "row 1: the prompt is a list and the completion a str"),
        (["a", "b"], ["c", assistant("d")], "row 1: the prompt is a str and the completion a list"),
        ([None], [None], "row 0: the prompt is a NoneType"),
        ([user("a"), user([{"type": "image"}])], [assistant("b")] * 2, r"row 1: turn 0 \('user'\) holds a part that"),
        (
            [user("a")],
            [assistant([{"type": "audio"}])],
            r"row 0: turn 1 \('assistant'\) holds a part that is not text",
        ),
    ],
)
def test_rows_that_make_no_sense(prompts, completions, message, reward_dir):
    with pytest.raises(ValueError, match=message):
        DiscoReward(reward_dir())(prompts=prompts, completions=completions)


# Rewards


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 8192])
def test_rewards_are_the_models_own(tokens_per_batch, reward_dir):
    reward = DiscoReward(reward_dir(), tokens_per_batch=tokens_per_batch)
    own = distribution_of(load(reward_dir()), reward.tokenize(PROMPTS, COMPLETIONS))
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == close(own.location)
    distribution = reward.distribution(PROMPTS, COMPLETIONS)
    assert distribution.location.tolist() == close(own.location)
    assert distribution.scale.tolist() == close(own.scale)
    assert own.location.std() > 0.01
    assert own.scale.std() > 0.01


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_an_empty_batch(transform, reward_dir):
    logged = []
    reward = DiscoReward(reward_dir(), transform=transform)
    log = {"log_metric": lambda *args: logged.append(args), "log_extra": lambda name, values: logged.extend(values)}
    assert reward(prompts=[], completions=[], **log) == []
    assert logged == []


def test_win_rates_are_among_answers_to_the_same_prompt(reward_dir):
    reward = DiscoReward(reward_dir(), transform="win_rate")
    own = distribution_of(load(reward_dir()), reward.tokenize(PROMPTS, COMPLETIONS))

    def beats(one, other):
        spread = math.hypot(own.scale[one], own.scale[other])
        return NormalDist().cdf(float(own.location[one] - own.location[other]) / spread)

    expected = [0.5] * 6  # row 3, the only answer to its prompt, keeps it
    for group in ([0, 2, 5], [1, 4]):
        for this in group:
            expected[this] = sum(beats(this, other) for other in group if other != this) / (len(group) - 1)
    rewards = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert rewards == pytest.approx(expected, abs=1e-5)
    assert rewards[3] == 0.5
    assert sum(abs(value - 0.5) > 1e-4 for value in rewards) == 5

    # As messages the same prompts are the same groups, however their keys are ordered.
    prompts = [[{"content": text, "role": "user"} if row % 2 else user(text)[0]] for row, text in enumerate(PROMPTS)]
    rewards = reward(prompts=prompts, completions=[assistant(text) for text in COMPLETIONS])
    assert [row for row, value in enumerate(rewards) if value == 0.5] == [3]
    assert [round(sum(rewards[row] for row in group), 4) for group in ([0, 2, 5], [1, 4])] == [1.5, 1.0]


def test_keys_of_prompts():
    # The same in every process, whatever Python's hash seed is.
    assert prompt_key("Who? ") == 3355957749960511703
    keys = {prompt_key(prompt) for prompt in ["a", "b", user("a"), user("b"), user("a") + assistant("b"), ["a"], ""]}
    assert len(keys) == 7
    assert all(0 <= key < 2**63 for key in keys)
    assert prompt_key("half a pair: \ud83d") > 0


def test_draws_are_reproducible_and_go_on(reward_dir):
    def draws(seed):
        reward = DiscoReward(reward_dir(), transform="sample", seed=seed)
        return [reward(prompts=PROMPTS, completions=COMPLETIONS) for _ in range(2)]

    first, second = draws(3)
    assert draws(3) == [first, second]
    assert all(abs(one - other) > 1e-4 for one, other in zip(first, second, strict=True))
    assert draws(4)[0] != first


def test_a_reward_that_is_not_finite_is_an_error(reward_dir):
    model = load(reward_dir())
    reward = DiscoReward(model, AutoTokenizer.from_pretrained(reward_dir()))
    (piano,) = reward.tokenize(["piano"], [""])
    with torch.no_grad():
        model.get_input_embeddings().weight[piano[0]] = math.nan
    with pytest.raises(FloatingPointError, match="row 1: the reward is nan"):
        reward(prompts=["Who? ", "piano"], completions=["people", ""])


# The model is only looked at


@pytest.fixture
def model_with_dropout(reward_dir, tmp_path):
    model = DiscoRewardModel.from_pretrained(reward_dir(), attention_dropout=0.5)
    assert model.config.attention_dropout == 0.5
    return model


def test_no_gradients_no_dropout_and_all_modes_as_before(model_with_dropout, reward_dir):
    model = model_with_dropout
    expected = DiscoReward(reward_dir())(prompts=PROMPTS, completions=COMPLETIONS)
    model.train()
    model.model.layers[0].eval()  # one that someone keeps frozen
    modes = [module.training for module in model.modules()]
    ids = torch.tensor([[5, 6, 7, 8, 9, 2]])
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

    reward = DiscoReward(model)
    with torch.enable_grad():
        distribution = reward.distribution(PROMPTS, COMPLETIONS)
        rewards = reward(prompts=PROMPTS, completions=COMPLETIONS)
    assert rewards == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert not distribution.location.requires_grad
    assert not distribution.scale.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_modes_are_restored_after_an_error(model_with_dropout):
    reward = DiscoReward(model_with_dropout.train())
    model_with_dropout.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reward(prompts=["a"], completions=["b"])
    assert all(module.training for module in model_with_dropout.modules())


def test_the_active_adapter_is_asked(tiny_llama_dir, tiny_tokenizer):
    """Its location, its scale, and what it knows of its own training rows."""
    model = lora(load(tiny_llama_dir))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter("other", model.peft_config["default"])
    reward = DiscoReward(model, tiny_tokenizer)
    sequences = reward.tokenize(PROMPTS, COMPLETIONS)
    seen = {}
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        with torch.no_grad():
            head = model.get_base_model().scale_head
            for tensor in head.state_dict().values():
                tensor.zero_()
            head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(len(seen)))
            hidden_states = [model(input_ids=torch.tensor([ids])).pooled_hidden_state for ids in sequences]
            # Of location, the training rows' mean is 100 for one and 200 for the other.
            head.track(torch.cat(hidden_states), 100 * (1 + len(seen)) + torch.arange(6.0)[:, None])
        own = distribution_of(model.get_base_model(), sequences)
        metrics = {}
        rewards = reward(prompts=PROMPTS, completions=COMPLETIONS, log_metric=metrics.__setitem__)
        assert rewards == close(own.location)
        expected = (own.location.mean() - 100 * (1 + len(seen)) - 2.5) / torch.arange(6.0).std(correction=0)
        assert metrics["disco_mean/shift/location"] == pytest.approx(expected.item(), rel=1e-3)
        seen[adapter] = metrics["disco_mean/scale/mean"]
    assert seen["default"] != seen["other"]


# What it is made of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_path_is_loaded_as_asked(dtype, reward_dir):
    assert DiscoReward(reward_dir(), dtype=dtype, device="cpu").model.dtype == dtype


def test_a_live_model_finds_the_tokenizer_it_was_loaded_with(reward_dir):
    reward = DiscoReward(load(reward_dir()))
    assert reward.processing_class.chat_template == AutoTokenizer.from_pretrained(reward_dir()).chat_template


def test_a_live_adapter_wants_its_tokenizer(tiny_llama_dir, tmp_path):
    """Its base model's may have another chat template than training had; a path says which tokenizer was saved."""
    trained_with = AutoTokenizer.from_pretrained(tiny_llama_dir)
    trained_with.chat_template = "{% for message in messages %}{{ message['content'] }}|{% endfor %}"
    path = save_adapter(lora(load(tiny_llama_dir)), tmp_path)
    trained_with.save_pretrained(path)
    with pytest.raises(ValueError, match="processing_class=AutoTokenizer"):
        DiscoReward(load(path))
    ids = [expected_ids(trained_with, "Who?|people|")]
    assert DiscoReward(path).tokenize([user("Who?")], [assistant("people")]) == ids
    assert DiscoReward(load(path), trained_with).tokenize([user("Who?")], [assistant("people")]) == ids
    assert best_of_n([user("Who?")], [[assistant("people")]], model=path)[0].index == 0


def test_without_a_tokenizer(disco_dir):
    with pytest.raises(ValueError, match="holds no tokenizer"):
        DiscoReward(disco_dir("llama"))
    model = load(disco_dir("llama"))
    with pytest.raises(ValueError, match="holds no tokenizer"):
        DiscoReward(model)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="not loaded from a path"):
        DiscoReward(model)


def test_a_language_model_is_no_reward_model(tiny_llama_dir):
    with pytest.raises(ValueError, match="without a reward head: its rewards would be random"):
        DiscoReward(tiny_llama_dir)


def test_a_scalar_reward_model_is_one(tiny_llama_dir, tiny_tokenizer, tmp_path):
    model = load_stock(tiny_llama_dir)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    reward = DiscoReward(str(tmp_path))
    with torch.no_grad():
        outputs = [model(torch.tensor([ids])).logits[0, 0] for ids in reward.tokenize(PROMPTS, COMPLETIONS)]
    assert reward(prompts=PROMPTS, completions=COMPLETIONS) == close(torch.stack(outputs))
    distribution = reward.distribution(PROMPTS, COMPLETIONS)
    assert distribution.family == "logistic"  # Bradley–Terry
    assert torch.allclose(distribution.scale, torch.tensor(2**-0.5))
    with pytest.raises(TypeError, match="takes a disco model or its path, got LlamaForSequenceClassification"):
        DiscoReward(model, tiny_tokenizer)


def test_the_padding_token_is_the_tokenizers_where_the_model_has_none(reward_dir, tiny_tokenizer):
    model = load(reward_dir())
    expected = DiscoReward(copy.deepcopy(model))(prompts=PROMPTS, completions=COMPLETIONS)
    model.config.pad_token_id = None
    tokenizer_without = copy.deepcopy(tiny_tokenizer)
    tokenizer_without.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        DiscoReward(model, tokenizer_without)
    assert DiscoReward(model, tiny_tokenizer)(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("transform", "options", "settings", "message"),
    [
        ("median", {}, {}, "'median' is unknown"),
        ("lower_bound", {"beta": 1.0}, {}, "no option 'beta'"),
        ("lower_bound", {"k": -1.0}, {}, "k=-1.0 must be"),
        ("certainty_equivalent", {}, {"reward_family": "cauchy"}, "-∞"),
    ],
)
def test_transforms_are_refused_at_once(transform, options, settings, message, reward_dir):
    with pytest.raises(ValueError, match=message):
        DiscoReward(reward_dir(**settings), transform=transform, **options)


def test_certainty_equivalents_end_where_the_scale_reaches_beta(reward_dir):
    path = reward_dir(reward_family="logistic")
    scales = DiscoReward(path).distribution(PROMPTS, COMPLETIONS).scale
    wide = DiscoReward(path, transform="certainty_equivalent", beta=2 * scales.max().item())
    assert all(map(math.isfinite, wide(prompts=PROMPTS, completions=COMPLETIONS)))
    narrow = DiscoReward(path, transform="certainty_equivalent", beta=scales.median().item())
    with pytest.raises(ValueError, match="largest scale is"):
        narrow(prompts=PROMPTS, completions=COMPLETIONS)
