"""Prompts with answers, and what a reward model makes of them one by one."""

import pytest
import torch

from disco_trl import RewardDistribution


PROMPTS = ["Do you like it? ", "Who? ", "Do you like it? ", "Why? ", "Who? ", "Do you like it? "]
COMPLETIONS = ["a lot", "people", "not at all", "the film is short", "a user", "the answer is short"]


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def distribution_of(model, sequences):
    """One by one, by the model itself."""
    with torch.no_grad():
        rewards = [model.reward_distribution(input_ids=torch.tensor([ids])) for ids in sequences]
    location = torch.cat([reward.location for reward in rewards])
    return RewardDistribution(location, torch.cat([reward.scale for reward in rewards]), rewards[0].family)


def close(tensor):
    return pytest.approx(tensor.tolist(), rel=1e-5, abs=1e-5)
