"""`POST /get_reward`: OpenRLHF's contract, and the tokens of rendered text."""

import pytest
import requests
import torch
from reward_server import ANSWERS, MESSAGES, QUESTION, serve, tiny_reward
from server_questions import close, post
from tokenizers.processors import TemplateProcessing

from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.transforms import get_transform
from disco_trl.serving.app import RenderedTexts


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


def test_without_a_chat_template_every_text_is_plain(tiny_tokenizer):
    tiny_tokenizer.chat_template = None
    assert RenderedTexts(tiny_tokenizer)("Good.") == tokenize(tiny_tokenizer, "Good.")
