"""`disco_trl.data.rendering`: what chat templates make of texts and parts, with every template that TRL ships."""

import copy
import json
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from preference_rows import assistant, streamed, user
from tiny_models import load, randomize_heads
from tiny_training import disco_trainer, reward_trainer

from disco_trl import DiscoReward
from disco_trl.data.files import load_preferences
from disco_trl.data.rendering import fit_to_template, render
from disco_trl.data.tokenization import tokenize, tokenize_answers


TEMPLATES = {path.stem: path for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))}
NAMES = [name for name in TEMPLATES if not name.endswith("_training")]


def with_template(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATES[name].read_text()
    tokenizer.bos_token = tokenizer.eos_token  # some templates begin with it
    return tokenizer


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


def in_parts(messages):
    return [{**message, "content": parts(*cut(message["content"]))} for message in messages]


def cut(text):
    """A text in two, within a word: joined with anything between, it would be another text."""
    return text[:1], text[1:]


CHAT = [user("How is the film?"), assistant("Rather good."), user("And the piano?"), assistant("It is out of tune.")]


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_read_as_their_text_by_every_template(name, tiny_tokenizer):
    """Every template that TRL ships makes of texts in parts what it makes of the same texts as strings."""
    tokenizer = with_template(tiny_tokenizer, name)
    text = render(tokenizer, fit_to_template(tokenizer, CHAT))
    assert text == render(tokenizer, fit_to_template(tokenizer, in_parts(CHAT)))
    said = [message["content"] for message in CHAT]
    assert all(text.count(words) == 1 for words in said)
    assert "'text'" not in text and '"text"' not in text
    assert tokenize(tokenizer, in_parts(CHAT)) == tokenizer(text, add_special_tokens=False)["input_ids"]


TAKES_STRINGS = [name for name in NAMES if name not in ("idefics3", "llava_next", "smolvlm")]


@pytest.mark.parametrize("name", TAKES_STRINGS)
def test_strings_are_rendered_as_they_are(name, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, name)
    assert render(tokenizer, fit_to_template(tokenizer, CHAT)) == render(tokenizer, CHAT)


@pytest.mark.parametrize(
    "name", ["gemma3", "gemma4", "glm4moe", "qwen2_5_vl", "qwen3_vl", "qwen3_5_think", "lfm2_2_5"]
)
def test_a_template_that_takes_parts_is_given_them(name, tiny_tokenizer):
    """Gemma 3, for one, trims each part, so that to join them would give other tokens than TRL's."""
    tokenizer = with_template(tiny_tokenizer, name)
    messages = [user(parts(" How is ", " the film? ")), assistant(parts("Rather ", " good. "))]
    assert fit_to_template(tokenizer, messages) == messages


def test_the_form_may_depend_on_the_role(tiny_tokenizer):
    """Gemma 3 takes the parts of a user, and the first part only of a system turn."""
    tokenizer = with_template(tiny_tokenizer, "gemma3")
    system = {"role": "system", "content": parts("Be brief. ", "Be kind.")}
    messages = [system, user(parts("Who?")), assistant(parts("You."))]
    fitted = fit_to_template(tokenizer, messages)
    assert [message["content"] for message in fitted] == ["Be brief. Be kind.", parts("Who?"), parts("You.")]
    assert "Be brief. Be kind." in render(tokenizer, fitted)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "qwen3_vl"])
def test_nulls_of_arrow_are_no_pictures(name, tiny_tokenizer):
    """Beside a row with a picture, Arrow gives every text part the key `image`, which Qwen3-VL takes for a picture."""
    tokenizer = with_template(tiny_tokenizer, name)
    row = [user([{"type": "text", "text": "Who?", "image": None}]), assistant([{"type": "text", "text": "You."}])]
    assert tokenize(tokenizer, row) == tokenize(tokenizer, [user("Who?"), assistant("You.")])


@pytest.mark.parametrize("name", ["qwen2_5", "llama3", "gemma4"])
def test_nulls_of_arrow_in_tool_calls_are_removed(name, tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, name)

    def conversation(arguments, **more):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        tool = {"role": "tool", "name": "f", "content": "4", **more}
        return [{**user("Two?"), **more}, {"role": "assistant", "tool_calls": [call]}, tool, assistant("Four.")]

    nulls = conversation({"city": "Rome", "stock": None, "options": {"a": None, "b": [None, 1]}}, tool_calls=None)
    meant = conversation({"city": "Rome", "options": {"b": [None, 1]}})
    assert tokenize(tokenizer, nulls) == tokenize(tokenizer, meant)
    assert render(tokenizer, nulls) != render(tokenizer, meant) or name == "llama3"  # which renders no calls


# What a template leaves out


@pytest.mark.parametrize("content", ["Search well.", parts("Search well.")])
def test_a_turn_that_the_template_leaves_out_is_refused(content, tiny_tokenizer):
    """Phi 3's template knows no tools, and renders nothing of what they answer."""
    tokenizer = with_template(tiny_tokenizer, "phi3")
    call = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [user("Who?"), call, {"role": "tool", "content": content}, assistant("You.")]
    with pytest.raises(ValueError, match=r"leaves out the text of turn 2 \('tool'\); give the turn a role"):
        tokenize(tokenizer, messages)


def test_what_is_said_beside_a_tool_call_may_be_left_out(tiny_tokenizer):
    """As Llama 3.1's template does, which TRL trains on."""
    tokenizer = with_template(tiny_tokenizer, "llama3_1")
    call = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    for content in ("I look.", parts("I look."), None):
        messages = [user("Who?"), {"role": "assistant", "content": content, "tool_calls": call}]
        ids = tokenize(tokenizer, [*messages, {"role": "tool", "content": "You."}, assistant("You.")])
        text = tokenizer.decode(ids)
        assert '{"name": "f", "parameters": {"a": 1}}' in text and "I look" not in text


def test_calls_of_tools_and_none_of_them_are_two_kinds_of_turns(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    said = "{{ m['tool_calls'] or '' if 'tool_calls' in m else m['content'] }}"
    tokenizer.chat_template = "{% for m in messages %}" + said + "{% endfor %}"
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    messages = [user("Who?"), {**assistant("I look."), "tool_calls": calls}]
    with pytest.raises(ValueError, match="leaves out the text of turn 1"):
        tokenize(tokenizer, [messages[0], {**messages[1], "tool_calls": []}])
    assert "I look." not in tokenizer.decode(tokenize(tokenizer, messages))


THOUGHT = "<think>\nHm, who?\n</think>\n\n"


@pytest.mark.parametrize("name", [name for name in TAKES_STRINGS if name.startswith(("qwen", "deepseek", "glm"))])
@pytest.mark.parametrize("text", ["  You.  ", f"{THOUGHT}You.", 'A "quoted" word\n\nand <b>an end</b>\n', "a"])
def test_what_templates_trim_and_take_out_is_no_reason_to_refuse(name, text, tiny_tokenizer):
    """Spaces, the reasoning of earlier answers, and what is escaped."""
    tokenizer = with_template(tiny_tokenizer, name)
    conversation = [user(text), assistant(f"{THOUGHT}Nobody."), user(text)]
    row = {"prompt": conversation, "chosen": [assistant(text)], "rejected": [assistant("Not you.")]}
    expected = tokenizer.apply_chat_template([*conversation, assistant(text)], tokenize=True, return_dict=True)
    assert tokenize_answers(row, tokenizer)[0] == expected["input_ids"]


def test_an_answer_of_reasoning_alone_that_the_template_takes_out(tiny_tokenizer):
    row = {"prompt": [user("Who?")], "chosen": [assistant("<think>Hm.</think>")], "rejected": [assistant("You.")]}
    with pytest.raises(ValueError, match="leaves nothing of the answer, which is reasoning alone"):
        tokenize_answers(row, with_template(tiny_tokenizer, "deepseek_r1_distill"))
    kept, _ = tokenize_answers(row, with_template(tiny_tokenizer, "llama3"))
    assert "Hm." in tiny_tokenizer.decode(kept)
    # A policy may answer nothing, and this is the same.
    r1 = with_template(tiny_tokenizer, "deepseek_r1_distill")
    assert tokenize(r1, row["prompt"] + row["chosen"]) == tokenize(r1, [user("Who?"), assistant("")])


def test_an_error_of_the_templates_own_is_kept(tiny_tokenizer):
    tokenizer = with_template(tiny_tokenizer, "gemma")
    with pytest.raises(ValueError, match="System role not supported"):
        tokenize(tokenizer, [{"role": "system", "content": parts("Be brief.")}, user("Who?"), assistant("You.")])


def test_a_prompt_of_ppo_that_continues_as_training_writes_it(tiny_tokenizer):
    """What `docs/rlhf.md` advises for Qwen 3, whose template puts an empty block of reasoning before an answer."""
    tokenizer = with_template(tiny_tokenizer, "qwen3")
    trained_on = render(tokenizer, [user("Who?"), assistant("You.")])
    prompt = {"conversation": [user("Who?")], "add_generation_prompt": True}
    assert trained_on.startswith(render(tokenizer, **prompt, enable_thinking=False) + "You.<|im_end|>")
    assert not trained_on.startswith(render(tokenizer, **prompt) + "You.")


# In training


def calls_of_tools():
    """Rows whose tools and arguments differ, so that Arrow gives each row the keys of the others."""
    rows = []
    for number, name in enumerate(["city", "stock"]):
        function = {"name": "f", "arguments": {name: "Rome"}}
        parameters = {"type": "object", "properties": {name: {"type": "string", "enum": ["Rome", None]}}}
        call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        rows.append(
            {
                "prompt": [user(f"{number}?"), call, {"role": "tool", "content": "4"}],
                **{"chosen": [assistant("Four.")], "rejected": [assistant("Five.")]},
                "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
                "chat_template_kwargs": {name: "said"},
            }
        )
    return rows


def test_tokens_do_not_depend_on_how_rows_are_stored(tiny_llama_dir, tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, "qwen2_5")
    tokenizer.chat_template += "{{ 'city is defined' if city is defined }}{{ 'stock is defined' if stock is defined }}"
    rows = calls_of_tools()
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")

    def trained_on(dataset):
        options = {"model": tiny_llama_dir, "processing_class": tokenizer, "train_dataset": dataset}
        return ids_of(disco_trainer(tmp_path / "out", prefix_sharing=False, **options))

    reward = DiscoReward(randomize_heads(load(tiny_llama_dir)), tokenizer)
    columns = {name: [row[name] for row in rows] for name in ("tools", "chat_template_kwargs")}
    sides = [
        reward.tokenize([row["prompt"] for row in rows], [row[side] for row in rows], **columns)
        for side in ("chosen", "rejected")
    ]
    scored = [list(of_row) for of_row in zip(*sides, strict=True)]
    for index, (name, other) in enumerate([("city", "stock"), ("stock", "city")]):
        text = tokenizer.decode(scored[index][0])
        assert f'"arguments": {{"{name}": "Rome"}}' in text and f"{name} is defined" in text
        assert other not in text and '"enum": ["Rome", null]' in text
    for suffix in ("jsonl", "parquet"):
        assert trained_on(load_preferences(f"{tmp_path}/rows.{suffix}")["train"]) == scored
    assert trained_on(streamed(list(Dataset.from_list(rows)))) == scored


def pairs(form):
    answers = [("Rather good.", "No."), ("You.", "Nobody at all."), ("It is late.", "Early.")]
    return [
        {
            "prompt": form([user(f"Question {number}?")]),
            "chosen": form([assistant(a)]),
            "rejected": form([assistant(b)]),
        }
        for number, (a, b) in enumerate(answers)
    ]


def formatted(rows):
    return Dataset.from_list(rows).with_format("torch")


def ids_of(trainer):
    return [[row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset]


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_parts_train_with_the_tokens_of_trl(name, tiny_llama_dir, tiny_tokenizer, tmp_path):
    tokenizer = with_template(tiny_tokenizer, name)
    rows = Dataset.from_list(pairs(in_parts))
    options = {"model": tiny_llama_dir, "processing_class": tokenizer, "train_dataset": rows}
    ours, theirs = disco_trainer(tmp_path / "ours", **options), reward_trainer(tmp_path / "theirs", **options)
    assert ids_of(ours) == ids_of(theirs)


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
@pytest.mark.parametrize("make", [Dataset.from_list, streamed, formatted])
def test_parts_train_as_their_texts_where_the_template_takes_none(
    name, make, tiny_llama_dir, tiny_tokenizer, tmp_path
):
    tokenizer = with_template(tiny_tokenizer, name)

    def trained_on(form):
        options = {"model": tiny_llama_dir, "processing_class": tokenizer, "train_dataset": make(pairs(form))}
        trainer = disco_trainer(tmp_path, prefix_sharing=False, **options)
        return [[list(map(int, ids)) for ids in sides] for sides in ids_of(trainer)]

    assert trained_on(in_parts) == trained_on(list)
