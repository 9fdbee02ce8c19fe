"""Checkpoints that the contract tests share; read-only by custom."""

import functools
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def base_model_dir(tmp_path_factory) -> Callable[[str], str]:
    """`base_model_dir("llama")` is a directory with a tiny random base language model of that architecture."""

    @functools.cache
    def make(architecture: str) -> str:
        from tiny_models import base_model

        path = tmp_path_factory.mktemp(f"base-{architecture}")
        base_model(architecture).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def disco_dir(base_model_dir, tmp_path_factory) -> Callable[[str], str]:
    """`disco_dir("llama")` is a directory with a disco checkpoint whose head is not the fresh one."""

    @functools.cache
    def make(architecture: str, **settings) -> str:
        from tiny_models import randomize_heads

        from disco_trl import DiscoRewardModel

        path = tmp_path_factory.mktemp(f"disco-{architecture}")
        model = DiscoRewardModel.from_pretrained(base_model_dir(architecture), **settings)
        randomize_heads(model).save_pretrained(path)
        return str(path)

    return make


@pytest.fixture(scope="session")
def scalar_dir(base_model_dir, tmp_path_factory) -> Callable[[str], str]:
    """`scalar_dir("llama")` is a user's Bradley–Terry reward model, saved by the stock class."""

    @functools.cache
    def make(architecture: str) -> str:
        import torch
        from transformers import AutoModelForSequenceClassification

        path = tmp_path_factory.mktemp(f"scalar-{architecture}")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = AutoModelForSequenceClassification.from_pretrained(base_model_dir(architecture), num_labels=1)
        model.save_pretrained(path)
        return str(path)

    return make
