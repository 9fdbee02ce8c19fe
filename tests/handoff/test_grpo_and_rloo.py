"""A disco reward model in TRL's `GRPOTrainer` and `RLOOTrainer`: what they log is the reward worked out by hand."""

import math
from statistics import NormalDist

import pytest
import torch
from policy_training import QUESTIONS, by_hand, handed_off, prompts, run, token_ids
from tiny_models import load, lora, save_adapter
from tiny_training import TOOL
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from disco_trl import DiscoReward


TRAINERS = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}
both_trainers = pytest.mark.parametrize("trainer", TRAINERS)


def close(values, abs=1e-5):
    return pytest.approx(values.tolist(), rel=1e-5, abs=abs)


# In its place, without an adaptor


@both_trainers
@pytest.mark.parametrize("checkpoint", ["full", "adapter", "merged"])
@pytest.mark.parametrize("how", ["path", "live", "DiscoReward"])
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_the_reward_is_the_location(trainer, checkpoint, how, kind, reward_dirs, tiny_llama_dir, tmp_path):
    path = reward_dirs[checkpoint]
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {}
    if how == "live" and checkpoint == "adapter":
        options["reward_processing_classes"] = tokenizer  # TRL finds it by itself for a `PreTrainedModel` only
    reward = handed_off(path, how)
    result = run(*TRAINERS[trainer], tiny_llama_dir, reward, tmp_path, train_dataset=prompts(kind), **options)

    ended = [token_ids(tokenizer, conversation) for conversation in result.conversations]
    # TRL's own path leaves a text without the end that training gave it, which is another text.
    endless = [token_ids(tokenizer, conversation, end=False) for conversation in result.conversations]
    location, _ = by_hand(path, ended if how == "DiscoReward" else endless)
    assert location.std() > 0.01
    assert result.reward == close(location)
    assert result.mean_reward == close(location.mean())
    other, _ = by_hand(path, endless if how == "DiscoReward" else ended)
    assert (result.reward == close(other)) == (kind == "messages")


@both_trainers
def test_among_other_rewards_and_weighted(trainer, reward_dirs, tiny_llama_dir, tmp_path):
    def length(completions, **columns):
        return [len(completion[0]["content"]) for completion in completions]

    path = reward_dirs["full"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    rewards = [DiscoReward(path, transform="lower_bound", k=2.0), length, reward_dirs["merged"]]
    result = run(
        *TRAINERS[trainer],
        tiny_llama_dir,
        rewards,
        tmp_path,
        train_dataset=prompts("messages"),
        reward_weights=[0.5, -0.1, 2.0],
    )
    ids = [token_ids(tokenizer, conversation) for conversation in result.conversations]
    location, scale = by_hand(path, ids)
    lengths = torch.tensor([float(len(conversation[-1]["content"])) for conversation in result.conversations])
    merged, _ = by_hand(reward_dirs["merged"], ids)
    assert result.rewards["disco_lower_bound"] == close(location - 2 * scale)
    assert result.rewards["length"] == close(lengths)
    assert result.rewards["merged"] == close(merged)
    expected = 0.5 * (location - 2 * scale) - 0.1 * lengths + 2 * merged
    assert result.logs["reward"] == close(expected.mean())


@pytest.mark.parametrize("how", ["path", "live", "DiscoReward"])
def test_in_bfloat16(how, reward_dirs, tiny_llama_dir, tmp_path):
    """TRL's default: it runs a reward model under autocast. `DiscoReward` is out of its reach."""
    path = reward_dirs["full"]
    reward = handed_off(path, how)
    result = run(
        GRPOTrainer, GRPOConfig, tiny_llama_dir, reward, tmp_path, train_dataset=prompts("messages"), bf16=True
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    location, _ = by_hand(path, [token_ids(tokenizer, conversation) for conversation in result.conversations])
    assert result.reward == close(location, abs=1e-5 if how == "DiscoReward" else 0.05)


def test_by_the_path_of_an_adapter_trl_takes_the_tokenizer_of_its_base(reward_dirs, tiny_llama_dir, tmp_path):
    # The adapter was trained with a chat template of its own, which is saved with it.
    path = tmp_path / "adapter"
    trained_with = AutoTokenizer.from_pretrained(tiny_llama_dir)
    trained_with.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    save_adapter(lora(load(tiny_llama_dir)), path)
    trained_with.save_pretrained(path)
    base = AutoTokenizer.from_pretrained(tiny_llama_dir)

    def rewards(name, reward, **options):
        return run(
            GRPOTrainer,
            GRPOConfig,
            tiny_llama_dir,
            reward,
            tmp_path / name,
            train_dataset=prompts("messages"),
            **options,
        )

    def expected(result, tokenizer):
        return by_hand(path, [token_ids(tokenizer, conversation) for conversation in result.conversations])[0]

    wrong = rewards("wrong", str(path))
    assert wrong.reward == close(expected(wrong, base))
    assert wrong.reward != close(expected(wrong, trained_with), abs=0.01)

    right = rewards("right", str(path), reward_processing_classes=AutoTokenizer.from_pretrained(path))
    assert right.reward == close(expected(right, trained_with))
    ours = rewards("ours", DiscoReward(str(path)))
    assert ours.reward == close(expected(ours, trained_with))


# With the uncertainty used


def probability_of_winning(location, scale, this, other):
    return NormalDist().cdf((location[this] - location[other]) / math.hypot(scale[this], scale[other]))


def transformed(name, location, scale):
    """Every transform's default by hand, for groups of four."""
    if name == "win_rate":
        groups = [range(start, start + 4) for start in range(0, len(location), 4)]
        return torch.tensor(
            [
                sum(probability_of_winning(location, scale, this, other) for other in group if other != this) / 3
                for group in groups
                for this in group
            ]
        )
    uniform = torch.rand(len(location), dtype=torch.float64, generator=torch.Generator().manual_seed(5)).tolist()
    return {
        "mean": lambda: location,
        "lower_bound": lambda: location - scale,
        "quantile": lambda: location - 1.2815516 * scale,  # Φ⁻¹(0.9)
        "certainty_equivalent": lambda: location - scale.square() / 2,
        "sample": lambda: location + scale * torch.tensor([NormalDist().inv_cdf(u) for u in uniform]),
    }[name]()


@pytest.mark.parametrize(
    "transform", ["mean", "lower_bound", "quantile", "certainty_equivalent", "win_rate", "sample"]
)
@pytest.mark.parametrize("trainer", ["GRPO", pytest.param("RLOO", marks=pytest.mark.slow)])
def test_every_transform(trainer, transform, reward_dirs, tiny_llama_dir, tmp_path):
    path = reward_dirs["full"]
    options = {"seed": 5} if transform == "sample" else {}
    reward = DiscoReward(path, transform=transform, **options)
    settings = {"num_generations": 4, "per_device_train_batch_size": 8}
    if trainer == "GRPO":
        settings["scale_rewards"] = "none"
    result = run(*TRAINERS[trainer], tiny_llama_dir, reward, tmp_path, **settings)
    tokenizer = AutoTokenizer.from_pretrained(path)
    location, scale = by_hand(path, [token_ids(tokenizer, text) for text in result.conversations])
    expected = transformed(transform, location, scale)
    assert expected.std() > 1e-3
    assert result.reward == close(expected, abs=1e-4)
    assert result.mean_reward == close(expected.mean(), abs=1e-4)
    if trainer == "GRPO":
        # Not divided by the group's standard deviation: differences of probabilities stay what they are.
        advantages = expected - expected.view(-1, 4).mean(dim=1).repeat_interleave(4)
        assert result.advantages == close(advantages, abs=1e-4)


# What TRL brings, and what it takes to its logs


def test_columns_of_the_dataset_reach_the_chat_template(reward_dirs, tiny_llama_dir, tmp_path):
    path = reward_dirs["full"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    tools = [TOOL]
    dataset = prompts("messages", tools=[tools] * len(QUESTIONS), answer=QUESTIONS)
    result = run(GRPOTrainer, GRPOConfig, tiny_llama_dir, DiscoReward(path), tmp_path, train_dataset=dataset)
    with_tools, _ = by_hand(path, [token_ids(tokenizer, row, tools=tools) for row in result.conversations])
    without, _ = by_hand(path, [token_ids(tokenizer, row) for row in result.conversations])
    assert result.reward == close(with_tools)
    assert result.reward != close(without, abs=0.01)


@both_trainers
@pytest.mark.parametrize("of_rows", [False, True], ids=["of the config", "of the rows too"])
def test_template_arguments_of_the_config_are_those_of_trls_own_path(
    trainer, of_rows, reward_dirs, tiny_llama_dir, tmp_path
):
    path = reward_dirs["full"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{{ style }}, {{ mood }}: " + tokenizer.chat_template
    given = {"style": "short and careful", "mood": "good"}
    columns = {"chat_template_kwargs": [{"mood": "bad"}, {"mood": None}] * 2} if of_rows else {}
    result = run(
        *TRAINERS[trainer],
        tiny_llama_dir,
        [path, DiscoReward(path, tokenizer)],
        tmp_path,
        train_dataset=prompts("messages", **columns),
        reward_processing_classes=[tokenizer, None],
        chat_template_kwargs=given,
    )
    conversations = result.conversations
    theirs, _ = by_hand(path, [token_ids(tokenizer, row, **given) for row in conversations])
    assert result.rewards["full"] == close(theirs)
    # TRL does not read the rows' own arguments here. Arrow puts a null where a row has none.
    moods = ["bad" if of_rows and QUESTIONS.index(row[0]["content"]) % 2 == 0 else "good" for row in conversations]
    own = [{**given, "mood": mood} for mood in moods]
    ours, _ = by_hand(
        path, [token_ids(tokenizer, row, **kwargs) for row, kwargs in zip(conversations, own, strict=True)]
    )
    assert result.rewards["disco_mean"] == close(ours)
    without, _ = by_hand(path, [token_ids(tokenizer, row) for row in conversations])
    assert (ours - without).abs().max() > 0.01


@both_trainers
def test_metrics_and_columns_arrive(trainer, reward_dirs, tiny_llama_dir, tmp_path):
    path = reward_dirs["adapter"]
    result = run(*TRAINERS[trainer], tiny_llama_dir, DiscoReward(path, name="film"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    location, scale = by_hand(path, [token_ids(tokenizer, text) for text in result.conversations])
    assert result.extra["film/location"] == close(location)
    assert result.extra["film/scale"] == close(scale)
    assert result.logs["film/location/mean"] == close(location.mean())
    assert result.logs["film/scale/mean"] == close(scale.mean())
    close_calls = [abs(location[i] - location[i + 1]) < math.hypot(scale[i], scale[i + 1]) for i in (0, 2)]
    assert result.logs["film/within_noise"] == sum(close_calls) / 2


def test_a_live_model_is_left_as_it_was(reward_dirs, tiny_llama_dir, tmp_path):
    """Other than TRL's own path, which puts a live model into evaluation mode and wraps its forward."""
    model = load(reward_dirs["full"]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(GRPOTrainer, GRPOConfig, tiny_llama_dir, DiscoReward(model), tmp_path, max_steps=2)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("transform", ["mean", "lower_bound"])
def test_as_scalar_is_a_reward_model_here_too(transform, reward_dirs, tiny_llama_dir, tmp_path):
    path = reward_dirs["full"]
    tokenizer = AutoTokenizer.from_pretrained(path)
    reward = load(path).as_scalar(transform)
    result = run(GRPOTrainer, GRPOConfig, tiny_llama_dir, reward, tmp_path, reward_processing_classes=tokenizer)
    location, scale = by_hand(path, [token_ids(tokenizer, text, end=False) for text in result.conversations])
    assert result.reward == close(transformed(transform, location, scale))
