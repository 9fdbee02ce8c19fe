"""Tiny models that know the attributes `length` and `tone`, with random heads, as if they had been trained."""

from pathlib import Path
from typing import Any

import torch
from conftest import build_tokenizer
from tiny_models import lora, randomize_heads, save_adapter

from disco_trl import DiscoRewardModel


PROMPTS = ["the film ", "a piano ", "the film "]
ANSWERS = ["people like it best", "a short answer not at all", "it is a long day"]
WEIGHTS = {"tone": 1.0, "length": -0.5}
RATINGS = {"length": [1.0, 2.0, 3.0, 4.0, 5.0], "tone": [1.0, 2.0, 3.0]}


def know_attributes(model: Any, has_rest: bool) -> Any:
    """Have a model, or the one inside an adapter, know the attributes. With a rest it has overall judgements."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.add_attributes(
        {
            "names": list(RATINGS),
            "weights": [-0.25, 1.0],
            "likelihoods": [{"rating_values": values} for values in RATINGS.values()],
            "are_learned": has_rest,
            "has_rest": has_rest,
        }
    )
    randomize_heads(inner)
    with torch.no_grad():
        for _, head in inner.named_reward_heads():
            head.attributes.correlation.copy_(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
            head.attributes.raw_weight.copy_(torch.tensor([0.3, -0.2]) if has_rest else torch.zeros(2))
            for one in (head, *head.attributes.heads):
                if one.scale.fixed_scale is None:
                    one.scale.rows_seen.fill_(64)
            if head.bias is not None and not has_rest:
                head.bias.zero_()  # which no judgement has moved
            head.fold()
    return model.eval()


def save_attribute_model(base: str, path: Path, kind: str, **settings: Any) -> str:
    """Save a model of a kind: `judged` and `adapter` have overall judgements, `summed` is a weighted sum."""
    model = DiscoRewardModel.from_pretrained(base, **settings)
    if kind == "adapter":
        save_adapter(know_attributes(lora(model), has_rest=True), path)
    else:
        know_attributes(model, has_rest=kind == "judged").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)
