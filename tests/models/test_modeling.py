"""A live model: precision, copies and errors; whole models are in contracts C1, C2 and C6."""

import copy

import pytest
import torch

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
