"""`disco_trl.data.tokenization`: token ids against TRL's."""

import pytest
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from disco_trl.data.tokenization import tokenize, tokenize_answers


TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
LAYOUTS = {
    "text": {"chosen": "The film is good.", "rejected": "The film is bad."},
    "text that ends already": {"chosen": "Good.<|im_end|>", "rejected": "Bad."},
    "text with a prompt": {"prompt": "How is the film? ", "chosen": "Good.", "rejected": "Bad."},
    "messages": {
        "chosen": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Bad."}],
    },
    "messages with a prompt": {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
    },
    "messages with tools": {
        "prompt": [{"role": "user", "content": "How?"}],
        "chosen": [{"role": "assistant", "content": "Good."}],
        "rejected": [{"role": "assistant", "content": "Bad."}],
        "tools": [TOOL],
    },
    "tokens": {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_tokenized_as_trl_does(layout, tiny_llama_dir, tiny_tokenizer, tmp_path):
    row = LAYOUTS[layout]
    trainer = RewardTrainer(
        model=tiny_llama_dir,
        args=RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([row]),
        processing_class=tiny_tokenizer,
    )
    (expected,) = trainer.train_dataset
    assert tokenize_answers(row, tiny_tokenizer) == (expected["chosen_ids"], expected["rejected_ids"])


def test_long_texts_are_not_truncated(tiny_tokenizer):
    tiny_tokenizer.model_max_length = 8
    assert len(tokenize(tiny_tokenizer, "The film is good. " * 20)) > 100
