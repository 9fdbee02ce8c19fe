"""What `disco_trl.data.preparation` tokenizes, against TRL's own trainer, and what it drops."""

import copy
import json
import random
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, IterableDataset, Json
from preference_rows import (
    EXPLICIT,
    IMPLICIT,
    LEGAL,
    TOOLS,
    assistant,
    map_style,
    streamed,
    user,
)
from tiny_training import disco_trainer
from tokenizers import processors
from transformers import AutoModelForSequenceClassification, ByT5Tokenizer, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer

from disco_trl import DiscoRewardConfig, DiscoRewardTrainer
from disco_trl.data.columns import ROW_COLUMN
from disco_trl.data.preparation import finish_preferences


@pytest.fixture
def prepare(tiny_tokenizer, tmp_path):
    """What a trainer makes of its dataset. Ours asks the model how many tokens and which ratings it knows."""
    # It knows all tokens, and nothing of how people answer.
    model = SimpleNamespace(likelihoods={"overall": {}}, get_input_embeddings=lambda: None)

    def prepare(dataset, dataset_name="train", *, trainer=DiscoRewardTrainer, tokenizer=tiny_tokenizer, **options):
        config = DiscoRewardConfig if trainer is DiscoRewardTrainer else RewardConfig
        args = config(str(tmp_path), **{"max_length": None, "bf16": False, "report_to": "none", **options})
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # as TRL's constructor does
        made = trainer.__new__(trainer)
        made._adoption, made._surveyed_dataset = SimpleNamespace(model=model), None
        made._upstream = SimpleNamespace(called=set())
        return made._prepare_dataset(dataset, tokenizer, args, dataset_name)

    return prepare


@pytest.fixture
def compare_with_trl(prepare):
    """Assert that we leave of a dataset what TRL does: the rows, the columns, their types and the format."""

    def compare_with_trl(dataset, **options):
        theirs = prepare(dataset, trainer=RewardTrainer, **options)
        ours = prepare(dataset, **options)
        rows = list(ours)
        # In a stream as well, and in a dataset that shows some of its columns only
        assert [row.pop(ROW_COLUMN) is not None for row in rows] == [True] * len(rows)
        assert len(rows) > 0
        assert str(rows) == str(list(theirs))  # of tensors too
        if isinstance(dataset, Dataset):
            assert ours.remove_columns(ROW_COLUMN).features == theirs.features
            assert ours.format["type"] == theirs.format["type"]
            assert {*ours.format["columns"]} == {*theirs.format["columns"], ROW_COLUMN}

    return compare_with_trl


# Tokens

WORDS = "the answer film people like a short careful question piano day best help learn é 𝛼 \n <|im_end|>".split(" ")


def random_pairs(count, kind="standard"):
    """Pairs of which no two are alike, of different lengths."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        prompt, *answers = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(3))
        row = {"prompt": f"{number} {prompt} ", "chosen": answers[0] + ".", "rejected": answers[1] + "!"}
        if kind == "conversational":
            row = {
                "prompt": [user(row["prompt"])],
                **{side: [assistant(row[side])] for side in ("chosen", "rejected")},
            }
        rows.append(row)
    return rows


@pytest.mark.filterwarnings("ignore:Detected legacy dataset columns")
@pytest.mark.parametrize("make", [map_style, streamed])
@pytest.mark.parametrize("case", LEGAL)
def test_legal_rows_reach_the_model_as_trl_would_send_them(case, make, compare_with_trl, caplog):
    compare_with_trl(make(LEGAL[case]), max_length=1024)
    assert caplog.messages == []


TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}{{ flag }}<|im_end|>"

MORE = {
    "the end of text is there, or elsewhere": [
        {"prompt": "Two? ", "chosen": "Four.<|im_end|>", "rejected": "Five."},
        {"prompt": "Two? <|im_end|>", "chosen": "<|im_end|> Four.", "rejected": "<|im_end|>"},
        {"prompt": "Two? <|im", "chosen": "_end|>", "rejected": "_end|> "},
    ],
    "other tools in each row": [
        {**EXPLICIT, "tools": TOOLS},
        {**EXPLICIT, "tools": None},
        {**EXPLICIT, "tools": [{"type": "function", "function": {"name": "sub", "parameters": {"type": "array"}}}]},
    ],
    "other tools in each row, as JSON": [
        {**EXPLICIT, "tools": json.dumps([{"name": "f", "default": default}])} for default in (1, True, 1.0, "1")
    ],
    "template arguments that are equal but not the same": [
        {**EXPLICIT, "chat_template_kwargs": json.dumps({"chat_template": TEMPLATE, "flag": flag})}
        for flag in (1, True, 1.0, False, 0)
    ],
    "other template arguments in each row": [
        {**EXPLICIT, "chat_template_kwargs": {"chat_template": template, "add_generation_prompt": flag}}
        for template in (TEMPLATE, None)
        for flag in (True, False)
    ],
    "template arguments that act on the tokens": [
        {**EXPLICIT, "chat_template_kwargs": {"truncation": True, "max_length": length}} for length in (26, 27, 99)
    ],
    "padding in the template arguments": [
        {**EXPLICIT, "chosen": [assistant("Four. " * n)], "chat_template_kwargs": {"padding": True}} for n in (1, 9)
    ],
    "messages with other keys in the prompt": [
        {**EXPLICIT, "prompt": [{"role": "user", "content": "Two?", "name": "Ada"}]},
        {**EXPLICIT, "chosen": [{"role": "assistant", "content": "Four.", "reasoning": "2 + 2"}]},
    ],
}


@pytest.mark.parametrize("case", MORE)
def test_rows_that_are_not_rendered_alike(case, compare_with_trl):
    rows = MORE[case]
    if isinstance(rows[0].get("chat_template_kwargs"), str):  # Arrow would make the values one type
        rows = [{**row, "chat_template_kwargs": json.loads(row["chat_template_kwargs"])} for row in rows]
        compare_with_trl(Dataset.from_list(rows, features=Features({name: Json() for name in rows[0]})))
    else:
        compare_with_trl(map_style(rows))


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("kind", ["standard", "conversational"])
def test_many_rows_and_the_length_filter(kind, num_proc, compare_with_trl, prepare):
    dataset = Dataset.from_list(random_pairs(300, kind)).shuffle(seed=1)
    max_length = 35 if kind == "conversational" else 25
    assert 50 < len(prepare(dataset, max_length=max_length)) < 250
    compare_with_trl(dataset, max_length=max_length, dataset_num_proc=num_proc)


def upper(batch):
    return {name: [value.upper() if isinstance(value, str) else value for value in batch[name]] for name in batch}


@pytest.mark.parametrize(
    "give_format",
    [
        lambda dataset: dataset.with_format("torch"),
        lambda dataset: dataset.with_format("numpy", columns=["chosen", "rejected"], output_all_columns=True),
        lambda dataset: dataset.with_format(None, columns=["chosen", "rejected"]),
        lambda dataset: dataset.with_transform(upper),
    ],
    ids=["torch", "numpy", "some columns", "transform"],
)
def test_formats_of_the_users(give_format, compare_with_trl):
    rows = [{**row, "margin": 0.5} for row in random_pairs(5)]
    compare_with_trl(give_format(Dataset.from_list(rows)), max_length=1024)


class OwnTemplate(PreTrainedTokenizerFast):
    """A tokenizer that ends every conversation with a question."""

    def apply_chat_template(self, conversation, **kwargs):
        return super().apply_chat_template([*conversation, user("Good?")], **kwargs)


class OwnEncoding(PreTrainedTokenizerFast):
    """A tokenizer that does something to a text before it becomes tokens."""

    def _encode_plus(self, text, *args, **kwargs):
        return super()._encode_plus(text.replace("the", "a"), *args, **kwargs)


class OwnCall(PreTrainedTokenizerFast):
    """The same, a step earlier."""

    def __call__(self, text, *args, **kwargs):
        return super().__call__(text.replace("the", "a"), *args, **kwargs)


def of_class(kind):
    def change(tokenizer):
        return kind(
            tokenizer_object=tokenizer.backend_tokenizer,
            eos_token=tokenizer.eos_token,
            chat_template=tokenizer.chat_template,
        )

    return change


def of_bytes(tokenizer):
    slow = ByT5Tokenizer()
    slow.chat_template = tokenizer.chat_template
    return slow


def with_a_first_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    return tokenizer


def that_pads_and_cuts(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(3)
    return tokenizer


@pytest.mark.parametrize("kind", ["standard", "conversational"])
@pytest.mark.parametrize(
    "change",
    [
        *map(of_class, (OwnTemplate, OwnEncoding, OwnCall)),
        *(of_bytes, with_a_first_token, that_pads_and_cuts),
    ],
    ids=["own template", "own encoding", "own call", "of bytes", "with a first token", "that pads and cuts"],
)
def test_tokenizers_of_other_kinds(change, kind, compare_with_trl, tiny_tokenizer):
    compare_with_trl(Dataset.from_list(random_pairs(5, kind)), tokenizer=change(tiny_tokenizer))


def test_tokens_are_found_in_the_cache(prepare, tmp_path, tiny_tokenizer):
    Dataset.from_list(random_pairs(5, "conversational")).save_to_disk(tmp_path / "pairs")

    def prepared():
        dataset = Dataset.load_from_disk(tmp_path / "pairs")
        return prepare(dataset, tokenizer=copy.deepcopy(tiny_tokenizer))

    first = prepared()
    # Use leaves its traces in a tokenizer
    tiny_tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    second = prepared()
    assert first._fingerprint == second._fingerprint
    assert first.cache_files == second.cache_files
    assert len(first.cache_files) > 0
    tiny_tokenizer.chat_template = TEMPLATE
    assert prepared()._fingerprint != first._fingerprint


def test_memory_does_not_grow_with_the_rows(tmp_path, prepare):
    peaks = []
    for rows in (2500, 7500):
        path = tmp_path / str(rows)
        Dataset.from_list(random_pairs(rows)).save_to_disk(path)
        dataset = Dataset.load_from_disk(path)
        arrow_before = pa.total_allocated_bytes()
        tracemalloc.start()
        prepared = prepare(dataset, max_length=25)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert 0 < len(prepared) < rows
        # Row numbers and the positions of those kept, 8 bytes each, are all that stays.
        assert pa.total_allocated_bytes() - arrow_before < 40 * rows
    assert peaks[1] < 1.3 * peaks[0]


def test_errors_come_before_any_token(prepare, tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('rendered') }}"
    with pytest.raises(ValueError, match="train dataset, row 1, column 'rejected': no messages"):
        prepare(Dataset.from_list([EXPLICIT, {**EXPLICIT, "rejected": []}]))


def test_a_pad_token_without_an_embedding_is_named_before_training(tiny_llama_dir, tiny_tokenizer, tmp_path):
    """As users add one, without resizing the embeddings."""
    tiny_tokenizer.add_special_tokens({"pad_token": "<new>"})
    options = {"train_dataset": Dataset.from_list([EXPLICIT]), "processing_class": tiny_tokenizer}
    with pytest.raises(
        ValueError, match=r"padding token has the id 393, and the model has the ids 0 to 392: .*resize"
    ):
        disco_trainer(tmp_path / "refused", model=tiny_llama_dir, **options)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=1)
    model.resize_token_embeddings(len(tiny_tokenizer))
    disco_trainer(tmp_path / "trained", model=model, max_steps=1, **options).train()


@pytest.mark.parametrize("make", [map_style, streamed])
def test_a_prepared_dataset_passes_again_unchanged(make, prepare, caplog):
    same = {**EXPLICIT, "rejected": EXPLICIT["chosen"]}
    prepared = prepare(make([EXPLICIT, same, IMPLICIT | {"prompt": [user("Hello.")]}]), "eval", max_length=1024)
    rows = list(prepared)
    assert [row[ROW_COLUMN] for row in rows] == [0, 2]
    assert len(caplog.messages) == 1
    # As `trainer.evaluate(trainer.eval_dataset)` does.
    assert list(prepare(prepared, "eval", max_length=1024)) == rows
    assert len(caplog.messages) == 1


# Filters


def numbered(pairs):
    return [
        {ROW_COLUMN: 100 + i, "chosen_ids": chosen, "rejected_ids": rejected}
        for i, (chosen, rejected) in enumerate(pairs)
    ]


def test_identical_pairs_are_dropped_with_one_warning(caplog):
    pairs = [([1, 2], [1, 2]), ([1, 2], [2, 1]), ([1, 2], [1, 2, 3]), ([5], [5])]
    dropped = finish_preferences(Dataset.from_list(numbered(pairs)), "train")
    assert dropped[ROW_COLUMN][:] == [101, 102]
    assert caplog.messages == [
        "train dataset: dropped 2 of 4 pairs, whose 'chosen' and 'rejected' are identical after tokenization and "
        "teach nothing (row 100, 103)"
    ]


def test_the_warning_names_ten_rows_at_most(caplog):
    dataset = Dataset.from_list(numbered([([1], [1])] * 2500 + [([1], [2])]))
    assert finish_preferences(dataset, "eval")[ROW_COLUMN][:] == [2600]
    (message,) = caplog.messages
    assert message.startswith("eval dataset: dropped 2500 of 2501 pairs")
    assert message.endswith("(row 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, ...)")


def test_nothing_to_drop_costs_no_copy(caplog):
    dataset = Dataset.from_list(numbered([([1, 2], [2, 1]), ([3], [4])]))
    assert finish_preferences(dataset, "train") is dataset
    assert caplog.messages == []


def test_sides_of_different_integer_types_and_many_batches():
    rng = np.random.default_rng(0)
    chosen = [rng.integers(0, 3, rng.integers(1, 4)).tolist() for _ in range(3000)]
    rejected = [rng.integers(0, 3, rng.integers(1, 4)).tolist() for _ in range(3000)]
    table = pa.table(
        {
            "chosen_ids": pa.array(chosen, pa.list_(pa.int32())),
            "rejected_ids": pa.array(rejected, pa.large_list(pa.int64())),
        }
    )
    kept = finish_preferences(Dataset(table), "train")
    expected = [(a, b) for a, b in zip(chosen, rejected, strict=True) if a != b]
    assert 0 < len(expected) < 3000
    assert list(zip(kept["chosen_ids"], kept["rejected_ids"], strict=True)) == expected


def test_stream_drops_as_it_is_read_and_warns_once(caplog):
    pairs = [([1], [2]), ([3], [3]), ([4], [4]), ([5], [6])]
    stream = finish_preferences(streamed(numbered(pairs)), "train")
    assert caplog.messages == []
    for _ in range(2):
        assert [row[ROW_COLUMN] for row in stream] == [100, 103]
    assert caplog.messages == [
        "train dataset, row 101: 'chosen' and 'rejected' are identical after tokenization and teach nothing; dropped, "
        "as all further ones will be without a word"
    ]


def of_lengths(*lengths: int) -> list[dict]:
    return numbered([([1] * length, [2]) for length in lengths])


def test_pairs_that_are_too_long_are_counted(caplog):
    assert len(finish_preferences(Dataset.from_list(of_lengths(9, 2, 9, 2)), "train", max_length=8)) == 2
    assert caplog.messages == [
        "train dataset: dropped 2 of 4 pairs: 2 have a side of more than max_length=8 tokens; raise max_length (None "
        "keeps all)"
    ]


def test_a_stream_most_of_which_is_dropped_is_warned_of(caplog):
    fits = finish_preferences(streamed(of_lengths(9, 2, 9, 2)), "train", max_length=8)
    assert len(list(fits)) == 2
    assert caplog.messages == []
    rows = of_lengths(9, 9, 2) + numbered([([1], [1])])
    assert len(list(finish_preferences(streamed(rows), "eval", max_length=8))) == 1
    assert caplog.messages[0] == (
        "eval dataset: dropped 3 of 4 pairs of the stream: 2 have a side of more than max_length=8 tokens and 1 have "
        "identical sides after tokenization; raise max_length (None keeps all), and check that the chat template "
        "renders the last turn and that the sides differ"
    )
    caplog.clear()
    finish_preferences(streamed(of_lengths(*[9] * 60, *[2] * 200)), "train", max_length=8)
    (message,) = caplog.messages
    assert message.startswith("train dataset: dropped 60 of the first 100 pairs of the stream: 60 have a side")


def test_a_stream_is_read_no_further_than_is_looked_at():
    read = []

    def rows():
        for row in of_lengths(*[2] * 300):
            read.append(row[ROW_COLUMN])
            yield row

    finish_preferences(IterableDataset.from_generator(rows), "train", max_length=8)
    assert len(read) == 100


def test_a_stream_that_begins_with_too_many_dropped_pairs(monkeypatch):
    monkeypatch.setattr("disco_trl.data.preparation.MOST_DROPPED_OF_STREAM", 150)
    endless = IterableDataset.from_generator(lambda: (row for _ in iter(int, 1) for row in of_lengths(9)))
    with pytest.raises(ValueError, match=r"train dataset: no pair is left of the first 150: 150 have a side"):
        finish_preferences(endless, "train", max_length=8)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_length_filter_that_leaves_nothing(num_proc, prepare):
    with pytest.raises(ValueError) as error:
        prepare(Dataset.from_list([EXPLICIT] * 4), max_length=3, dataset_num_proc=num_proc)
    assert str(error.value) == (
        "train dataset: no pair is left of 4: 4 have a side of more than max_length=3 tokens; raise max_length (None "
        "keeps all)"
    )


def test_identical_pairs_alone_leave_nothing(prepare):
    same = {"chosen": "Four.", "rejected": "Four."}
    long = {"chosen": "Four. " * 50, "rejected": "Five."}
    with pytest.raises(ValueError) as error:
        prepare(Dataset.from_list([same, same]))
    assert str(error.value) == (
        "train dataset: no pair is left of 2: 2 have identical sides after tokenization; check that the chat template "
        "renders the last turn and that the sides differ"
    )
    with pytest.raises(ValueError) as error:
        prepare(Dataset.from_list([same, long, same]).shuffle(seed=0), max_length=20)
    assert str(error.value) == (
        "train dataset: no pair is left of 3: 1 have a side of more than max_length=20 tokens and 2 have identical "
        "sides after tokenization; raise max_length (None keeps all), and check that the chat template renders the "
        "last turn and that the sides differ"
    )
