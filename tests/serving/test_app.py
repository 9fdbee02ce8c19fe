"""`POST /score` of a real server: the answers are those of the model in this process."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from reward_server import ANSWERS, MESSAGES, QUESTION, held_up, serve, tiny_reward
from server_questions import close, located, metric, post, wait_for_queue
from tiny_training import TOOL

from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.transforms import get_transform


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


def test_items_of_every_kind_are_scored_as_training_tokenizes_them(reward, url):
    items = [
        "Good.",
        QUESTION + MESSAGES[0],
        {"prompt": "How? ", "completion": "Good."},
        {"prompt": QUESTION, "completion": MESSAGES[0]},
        {"prompt": QUESTION, "completion": MESSAGES[0], "tools": [TOOL]},
        {"completion": MESSAGES[0], "chat_template_kwargs": {"add_generation_prompt": True}},
        {"completion": [{"role": "assistant", "content": [{"type": "text", "text": "Good."}]}]},
    ]
    expected = reward.distribution(
        ["", QUESTION, "How? ", QUESTION, QUESTION, [], []],
        ["Good.", MESSAGES[0], "Good.", MESSAGES[0], MESSAGES[0], MESSAGES[0], MESSAGES[0]],
        tools=[None, None, None, None, [TOOL], None, None],
        chat_template_kwargs=[None, None, None, None, None, {"add_generation_prompt": True}, None],
    )
    answer = post(url, items=items)
    close(located(answer), expected.location)
    close([result["scale"] for result in answer["results"]], expected.scale)
    close([result["reward"] for result in answer["results"]], expected.location)
    assert answer["family"] == "normal" and answer["transform"] == "mean" and answer["prob_greater"] == []
    assert len(set(located(answer).tolist())) == 6  # the messages with and without a `prompt` are one text


def test_many_clients_at_once_get_their_own_answers(reward, url):
    texts = [f"{answer} {number}" for number in range(40) for answer in ANSWERS]
    expected = reward.distribution([""] * len(texts), texts).location
    requested = [list(range(start, min(start + 1 + start % 7, len(texts)))) for start in range(0, len(texts), 3)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda rows: post(url, items=[texts[row] for row in rows]), requested))
    for rows, answer in zip(requested, answers, strict=True):
        close(located(answer), expected[rows])


def test_what_waits_goes_through_the_model_together(reward):
    with serve(reward) as url, ThreadPoolExecutor(9) as clients, held_up(reward.model) as barrier:
        first = clients.submit(post, url, items=["First."])
        assert barrier.entered.wait(60)
        others = [clients.submit(post, url, items=[answer] * 2) for answer in ANSWERS]
        tokens = 2 * sum(len(tokenize(reward.processing_class, answer)) for answer in ANSWERS)
        wait_for_queue(url, lambda waiting: waiting == tokens)
        barrier.open.set()
        close(located(first.result()), reward.distribution([""], ["First."]).location)
        for answer, other in zip(ANSWERS, others, strict=True):
            close(located(other.result()), reward.distribution([""] * 2, [answer] * 2).location)
        assert metric(url, "disco_batch_texts_count") == 2
        assert metric(url, "disco_texts_total") == 9


def test_batches_keep_to_their_budget_and_requests_may_straddle_them(reward):
    texts = ["The answer is short. " * (1 + row % 4) for row in range(20)]
    lengths = [len(tokenize(reward.processing_class, text)) for text in texts]
    with serve(reward, max_batch_tokens=max(lengths) + 1) as url:
        answer = post(url, items=texts)
        close(located(answer), reward.distribution([""] * 20, texts).location)
        assert 20 > metric(url, "disco_batch_texts_count") >= sum(lengths) / (max(lengths) + 1)


@pytest.mark.parametrize(
    ("transform", "options"),
    [("lower_bound", {"k": 2}), ("quantile", {"q": 0.25}), ("certainty_equivalent", {"beta": 3.0}), ("mean", {})],
)
def test_a_request_may_choose_its_transform(reward, url, transform, options):
    found = reward.distribution([""] * 4, ANSWERS)
    answer = post(url, items=ANSWERS, transform=transform, **options)
    close([result["reward"] for result in answer["results"]], get_transform(transform, **options)(found))
    assert answer["transform"] == transform


def test_the_servers_own_transform_is_the_default(tiny_llama_dir, tiny_tokenizer):
    reward = tiny_reward(tiny_llama_dir, tiny_tokenizer, "lower_bound", k=0.5)
    found = reward.distribution([""] * 4, ANSWERS)
    with serve(reward) as url:
        answer, bolder = post(url, items=ANSWERS), post(url, items=ANSWERS, k=0.25)
    close([result["reward"] for result in answer["results"]], found.location - 0.5 * found.scale)
    close([result["reward"] for result in bolder["results"]], found.location - 0.25 * found.scale)


def test_draws_differ_from_request_to_request_unless_seeded(url):
    def draws(**request):
        return [result["reward"] for result in post(url, items=ANSWERS, transform="sample", **request)["results"]]

    assert draws() != draws()
    assert draws(seed=3) == draws(seed=3)


@pytest.mark.parametrize("named_by", ["prompt", "group"])
def test_win_rate_is_worked_out_within_the_request(reward, url, named_by):
    rows = [0, 1, 0, 0, 1, 2]
    completions = [*ANSWERS, "No.", "Alone."]
    prompts = ["A? ", "B? ", "C? "]
    items = [{"prompt": prompts[row], "completion": text} for row, text in zip(rows, completions, strict=True)]
    if named_by == "group":
        items = [
            {"completion": item["prompt"] + item["completion"], "group": f"{row}"}
            for row, item in zip(rows, items, strict=True)
        ]
    found = reward.distribution([prompts[row] for row in rows], completions)
    expected = get_transform("win_rate")(found, torch.tensor(rows))
    answer = post(url, items=items, transform="win_rate")
    close([result["reward"] for result in answer["results"]], expected)


def test_pairs_of_items_are_compared(reward, url):
    pairs = [[0, 1], [1, 0], [2, 3], [3, 3]]
    found = reward.distribution([""] * 4, ANSWERS)
    answer = post(url, items=ANSWERS, pairs=pairs)
    close(answer["prob_greater"], found[[0, 1, 2, 3]].prob_greater(found[[1, 0, 3, 3]]))
    assert answer["prob_greater"][0] + answer["prob_greater"][1] == pytest.approx(1)
