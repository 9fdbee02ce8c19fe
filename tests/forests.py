"""Models, pairs and forests for the tests of prefix sharing, in several rooms."""

import random

import torch
from datasets import Dataset
from tiny_models import EOS, PAD, VOCAB, randomize_heads
from transformers import AutoConfig, AutoModelForSequenceClassification

from disco_trl.models.upgrade import upgrade


SIZES = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_labels": 1,
}


def random_model(model_type: str, implementation: str = "sdpa", seed: int = 0, **more):
    """A disco model with weights so large that each token makes a visible difference to those after it."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
        upgrade(model)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:  # biases, which start at zero, and norms, near one
                parameter.data += 0.2 * torch.randn_like(parameter)
    randomize_heads(model)
    for parameter in model.score.parameters() if hasattr(model, "score") else ():
        parameter.data *= 0.3  # rewards and log-probabilities of order 1
    return model


def padded(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, sequences)), batch_first=True, padding_value=PAD)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return {"input_ids": rows, "attention_mask": (torch.arange(rows.shape[1]) < lengths[:, None]).long()}


def pairs(rows: int = 32, *, vocabulary: int = 60, seed: int = 0, margin: bool = False) -> Dataset:
    """Tokenized pairs of various lengths under few prompts, all of which begin alike; and one without a prompt."""
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> list[int]:
        return rng.choices(range(3, vocabulary), k=rng.randint(least, most))

    system = tokens(4, 4)
    prompts = [[*system, *tokens(2, 12)] for _ in range(6)] + [[]]
    examples = []
    for row in range(rows):
        prompt = prompts[row % len(prompts)]
        example = {side: [*prompt, *tokens(1, 12), EOS] for side in ("chosen_ids", "rejected_ids")}
        examples.append({**example, "margin": rng.uniform(0, 2)} if margin else example)
    return Dataset.from_list(examples)


def prefixes_by_place(forest) -> list[tuple[int, ...]]:
    """What stands on the path from a root to each place of the row, the place itself included."""
    prefixes: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []  # up to the end of each node
    for length, parent in zip(forest.lengths, forest.parents, strict=True):
        prefix = whole[parent] if parent >= 0 else ()
        for _ in range(length):
            prefix = (*prefix, forest.tokens[len(prefixes)])
            prefixes.append(prefix)
        whole.append(prefix)
    return prefixes
