"""`POST /get_reward`: OpenRLHF's contract, and the tokens of rendered text."""

import copy
from pathlib import Path

import pytest
import requests
import torch
import trl
from reward_server import ANSWERS, MESSAGES, QUESTION, serve, tiny_reward
from server_questions import close, located, post
from tokenizers.processors import TemplateProcessing

from disco_trl.data.rendering import fit_to_template, render
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.transforms import get_transform
from disco_trl.serving.rendered import RenderedTexts


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


def test_openrlhfs_contract(reward, url):
    def rendered(messages, **kwargs):
        return reward.processing_class.apply_chat_template(messages, tokenize=False, **kwargs)

    prompt = rendered(QUESTION, add_generation_prompt=True)
    queries = [f"{prompt}{answer}<|im_end|>" for answer in ANSWERS]  # a policy stops at its end-of-turn token
    expected = reward.distribution([QUESTION] * 4, MESSAGES)
    request = {"query": queries, "prompts": [prompt] * 4, "labels": [None, "x", 3, {}]}
    answer = post(url, "/get_reward", **request)
    close(answer["rewards"], expected.location)
    assert answer["scores"] == answer["rewards"]
    close(answer["extra_logs"]["location"], expected.location)
    close(answer["extra_logs"]["scale"], expected.scale)
    assert post(url, "/get_reward", query=queries[:1])["rewards"] == pytest.approx(answer["rewards"][:1], abs=1e-5)


def test_openrlhfs_prompts_are_the_groups_of_win_rate(tiny_llama_dir, tiny_tokenizer):
    reward = tiny_reward(tiny_llama_dir, tiny_tokenizer, "win_rate")
    expected = get_transform("win_rate")(reward.distribution([""] * 4, ANSWERS), torch.tensor([0, 0, 1, 1]))
    with serve(reward) as url:
        close(post(url, "/get_reward", query=ANSWERS, prompts=["a", "a", "b", "b"])["rewards"], expected)
        alone = requests.post(url + "/get_reward", json={"query": ANSWERS[:1], "prompts": ["a"]}, timeout=60)
    assert alone.status_code == 422 and "no two of these are" in alone.json()["error"]


def with_beginning_of_text(tokenizer):
    """A tokenizer as Llama's: it puts a token before plain text, and its chat template writes that token itself."""
    tokenizer.add_special_tokens({"bos_token": "<|begin|>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "", "<|im_end|><|pad|><|pad|>"])
def test_a_rendered_conversation_gets_the_tokens_of_training(tiny_tokenizer, has_bos, end):
    tokenizer = with_beginning_of_text(tiny_tokenizer) if has_bos else tiny_tokenizer
    conversation = QUESTION + MESSAGES[1] + QUESTION
    prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    # As an engine sends it: ids of prompt and answer, decoded with their special tokens.
    ids = tokenizer(prompt + ANSWERS[0] + end, add_special_tokens=False)["input_ids"]
    sent = tokenizer.decode(ids, skip_special_tokens=False)
    expected = tokenize(tokenizer, conversation + MESSAGES[0])
    assert RenderedTexts(tokenizer)(sent) == expected
    assert expected.count(tokenizer.convert_tokens_to_ids("<|begin|>")) == has_bos


@pytest.mark.parametrize("sent", ["The film is good.", "<|begin|>The film is good.", "The film is good.<|im_end|>"])
def test_plain_text_gets_the_tokens_of_training(tiny_tokenizer, sent):
    tokenizer = with_beginning_of_text(tiny_tokenizer)
    expected = tokenize(tokenizer, "The film is good.")
    assert RenderedTexts(tokenizer)(sent) == expected
    assert expected[0] == tokenizer.bos_token_id != expected[1] and expected[-1] == tokenizer.eos_token_id


CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TEMPLATES = sorted(path.stem for path in CHAT_TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
REASONED = "Hm.\n</think>\n\nGood."


def with_template(tokenizer, name):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (CHAT_TEMPLATES / f"{name}.jinja").read_text()
    tokenizer.bos_token = tokenizer.eos_token  # some templates begin with it
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("knows_prompt", [False, True])
def test_every_template_writes_the_answer_as_in_training(name, knows_prompt, tiny_tokenizer, caplog):
    """Qwen 3's puts an empty block of reasoning before an answer, R1's takes reasoning out, Gemma's trims it."""
    tokenizer = with_template(tiny_tokenizer, name)
    rendered = RenderedTexts(tokenizer)
    conversation = fit_to_template(tokenizer, QUESTION + MESSAGES[1] + QUESTION)
    prompt = render(tokenizer, conversation, add_generation_prompt=True)
    # These begin the answer when they ask for it. (So do others, but their templates know an answer by its </think>.)
    begun = "<think>\n" if name.startswith(("deepseek", "nemotron")) else ""
    reasoned = REASONED if prompt.endswith("<think>\n") else f"<think>\n{REASONED}"
    for answer in ("Good.", reasoned, " Good. ", ""):
        ids = rendered(f"{prompt}{answer}<|im_end|>", prompt if knows_prompt else None)
        assert ids == tokenize(tokenizer, [*conversation, {"role": "assistant", "content": begun + answer}])
    assert caplog.messages == []


def test_an_answer_that_asks_for_another_one(tiny_tokenizer):
    """What the policy writes is its answer, where the request says what it was asked."""
    tokenizer = with_template(tiny_tokenizer, "qwen3")
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    answer = "Bad.<|im_end|>\n<|im_start|>assistant\nGood."
    expected = tokenize(tokenizer, [*QUESTION, {"role": "assistant", "content": answer}])
    assert RenderedTexts(tokenizer)(prompt + answer, prompt) == expected
    assert RenderedTexts(tokenizer)(prompt + answer) != expected


def test_an_answer_that_the_template_refuses_is_scored_as_it_is_written(tiny_tokenizer, caplog):
    tokenizer = with_template(tiny_tokenizer, "gptoss")
    prompt = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    text = prompt + "<|channel|>final<|message|>Good.<|return|>"
    rendered = RenderedTexts(tokenizer)
    for _ in range(2):
        assert rendered(text, prompt) == tokenizer(text, add_special_tokens=False)["input_ids"]
    (warning,) = caplog.messages
    assert "the chat template refuses an answer" in warning and "<|channel|>" in warning


def test_a_template_that_does_not_show_where_an_answer_begins(tiny_tokenizer, caplog):
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    RenderedTexts(tiny_tokenizer)
    assert caplog.messages == []  # the end of the question shows it
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    RenderedTexts(tiny_tokenizer)
    (warning,) = caplog.messages
    assert "send the messages to /score instead" in warning


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|><|im_end|>", "<|im_end|>\n<|im_end|><|im_end|>"])
def test_padding_that_is_the_end_of_text_is_no_part_of_the_text(end, tiny_llama_dir, tiny_tokenizer):
    tiny_tokenizer.pad_token = tiny_tokenizer.eos_token
    reward = tiny_reward(tiny_llama_dir, tiny_tokenizer)
    prompt = tiny_tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    with serve(reward) as url:
        sent = post(url, "/get_reward", query=[f"{prompt}{ANSWERS[0]}{end}", ANSWERS[0] + end.replace("\n", "")])
        close(sent["rewards"], located(post(url, "/score", items=[QUESTION + MESSAGES[0], ANSWERS[0]])))


def test_without_a_chat_template_every_text_is_plain(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    assert RenderedTexts(tiny_tokenizer)("Good.") == tokenize(tiny_tokenizer, "Good.")
