"""`disco_trl.serving.client` and `disco_trl.serving.verl` with a real server: the rewards are those of the model in
this process.
"""

import asyncio
import importlib.util
import inspect
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import requests
import torch
from datasets import Dataset
from reward_server import ANSWERS, MESSAGES, QUESTION, held_up, serve, tiny_reward
from tiny_training import TOOL
from trl import GRPOConfig, GRPOTrainer

import disco_trl.serving.verl
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.transforms import get_transform
from disco_trl.serving.client import RemoteReward, ScoreClient, ServerError


@pytest.fixture
def reward(tiny_llama_dir, tiny_tokenizer):
    return tiny_reward(tiny_llama_dir, tiny_tokenizer)


@pytest.fixture
def url(reward):
    with serve(reward) as url:
        yield url


def close(actual, expected) -> None:
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=1e-5)


LAYOUTS = {
    "text": (["How is it? "] * 4, ANSWERS, {}),
    "messages": ([QUESTION] * 4, MESSAGES, {}),
    "tools": ([QUESTION] * 4, MESSAGES, {"tools": [[TOOL], None, json.dumps([TOOL]), None]}),
    "template": ([QUESTION] * 4, MESSAGES, {"chat_template_kwargs": [None, {"add_generation_prompt": True}] * 2}),
    "other columns": ([QUESTION] * 4, MESSAGES, {"answer": ["x"] * 4, "trainer_state": None, "tools": None}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_rewards_as_the_model_itself_does(reward, url, layout):
    prompts, completions, columns = LAYOUTS[layout]
    expected = reward.distribution(prompts, completions, **columns)
    remote = RemoteReward(url)
    found = remote.distribution(prompts, completions, **columns)
    close(found.location, expected.location)
    close(found.scale, expected.scale)
    close(remote(prompts, completions, **columns), expected.location)


@pytest.mark.parametrize(("transform", "options"), [("lower_bound", {"k": 0.5}), ("win_rate", {})])
def test_transforms_and_metrics_are_worked_out_by_the_client(reward, url, transform, options):
    prompts = [[{"role": "user", "content": text}] for text in ("One?", "Two?", "One?", "Two?")]
    local = tiny_reward(reward.model.config._name_or_path, reward.processing_class, transform, **options)
    remote = RemoteReward(url, transform, **options)
    logged: dict = {"local": {}, "remote": {}}
    values = {
        name: function(prompts, MESSAGES, log_metric=logged[name].__setitem__, log_extra=logged[name].__setitem__)
        for name, function in (("local", local), ("remote", remote))
    }
    close(values["remote"], values["local"])
    group = torch.tensor([0, 1, 0, 1])
    expected = get_transform(transform, **options)(reward.distribution(prompts, MESSAGES), group)
    close(values["remote"], expected)
    assert remote.__name__ == local.__name__ == f"disco_{transform}"
    assert logged["remote"].keys() == logged["local"].keys()
    for name in logged["local"]:
        close(logged["remote"][name], logged["local"][name])


def test_a_batch_is_cut_to_what_the_server_takes(reward):
    completions = [f"{answer} {row}" * (1 + row % 5) for row in range(25) for answer in ANSWERS]
    prompts = ["How is it? "] * len(completions)
    expected = reward.distribution(prompts, completions).location
    for limits in ({"max_texts_per_request": 7}, {"max_body_bytes": 1500}):
        with serve(reward, **limits) as url:
            close(RemoteReward(url)(prompts, completions), expected)
            answered = requests.get(url + "/metrics", timeout=60).text
            count = next(line for line in answered.splitlines() if 'path="/score",status="200"' in line)
            assert float(count.split()[-1]) >= 10
    with serve(reward) as url:
        assert RemoteReward(url)([], []) == []


def test_a_busy_server_is_asked_again_when_it_says(reward):
    tokens = len(tokenize(reward.processing_class, "Good."))
    with serve(reward, max_queue=tokens) as url, ThreadPoolExecutor(3) as clients, held_up(reward.model) as barrier:
        client = ScoreClient(url)
        first = clients.submit(client.score, items=["Good."])
        assert barrier.entered.wait(60)
        others = [clients.submit(client.score, items=["Good."]) for _ in range(2)]  # room for one of them
        while "503" not in requests.get(url + "/metrics", timeout=60).text:
            assert not any(other.done() for other in others)
        barrier.open.set()
        assert first.result() == others[0].result() == others[1].result()


def test_errors_say_where_and_why(reward, url):
    with pytest.raises(ServerError, match=r"no answer from http://127\.0\.0\.1:9/health.*Is `disco-trl serve`"):
        RemoteReward("http://127.0.0.1:9")
    with pytest.raises(ServerError, match=r"/score answered 422: items\[1\].completion\[0\].role: Field required"):
        RemoteReward(url)([QUESTION] * 2, [MESSAGES[0], [{"content": "Good."}]])
    with pytest.raises(ServerError, match=r"/nothing answered 404: Not Found"):
        ScoreClient(url)._request("GET", "/nothing")
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        RemoteReward(url)(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="no option 'q'"):
        RemoteReward(url, "lower_bound", q=0.5)
    with torch.no_grad():
        reward.model.score.weight.fill_(torch.nan)
    with pytest.raises(ServerError, match=r"answered 500: items\[0\]: .*not finite"):
        RemoteReward(url)(["a"], ["b"])


def test_a_transform_that_the_servers_family_has_not_is_refused_at_once(tiny_llama_dir, tiny_tokenizer, tmp_path):
    from disco_trl import DiscoRewardModel

    DiscoRewardModel.from_pretrained(tiny_llama_dir, reward_family="cauchy").save_pretrained(tmp_path)
    with serve(tiny_reward(str(tmp_path), tiny_tokenizer)) as url:
        with pytest.raises(ValueError, match="certainty equivalent of a 'cauchy' reward"):
            RemoteReward(url, "certainty_equivalent")


def test_the_token_is_shown(reward, monkeypatch):
    with serve(reward, token="s3cret") as url:
        expected = reward.distribution(["a"], ["b"]).location
        close(RemoteReward(url, token="s3cret")(["a"], ["b"]), expected)
        with pytest.raises(ServerError, match="answered 401"):
            RemoteReward(url)(["a"], ["b"])
        monkeypatch.setenv("DISCO_TRL_TOKEN", "s3cret")
        found = disco_trl.serving.verl.compute_score("", "b", None, {"prompt": "a"}, url=url)
        close(found["score"], expected[0])


def test_a_netrc_does_not_replace_the_token(reward, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anyone password another\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    expected = reward.distribution(["a"], ["b"]).location
    with serve(reward, token="s3cret") as url:
        close(RemoteReward(url, token="s3cret")(["a"], ["b"]), expected)
        close(RemoteReward(url, token=" s3cret\n")(["a"], ["b"]), expected)
        close(RemoteReward(url.replace("//", "//anyone:s3cret@"))(["a"], ["b"]), expected)
    with serve(reward, token="another") as url, pytest.raises(ServerError, match="answered 401"):
        RemoteReward(url)(["a"], ["b"])


def test_tokens_that_cannot_be_right_are_refused(url):
    with pytest.raises(ValueError, match="token is set, but empty"):
        ScoreClient(url, token="\n")
    with pytest.raises(ValueError, match="token contains a space"):
        ScoreClient(url, token="s3 cret")
    with pytest.raises(ValueError, match=r"the URL of http://10\.0\.0\.2 contains a token, and token= is another one"):
        ScoreClient("http://anyone:s3cret@10.0.0.2", token="another")


def test_a_token_in_the_url_is_not_shown():
    with pytest.raises(ServerError, match=r"no answer from http://127\.0\.0\.1:9/health") as caught:
        RemoteReward("http://anyone:s3cret@127.0.0.1:9")
    assert "s3cret" not in str(caught.value)


def test_a_redirect_is_an_error_that_names_the_target():
    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", f"https://example.org{self.path}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with pytest.raises(ServerError, match=r"/health redirects to https://example\.org: pass the URL"):
            RemoteReward(f"http://127.0.0.1:{server.server_port}", token="s3cret")
        thread.join()


def test_a_lone_answer_wins_half_and_is_warned_of_once(url, caplog):
    remote = RemoteReward(url, "win_rate")
    with caplog.at_level(logging.WARNING, "disco_trl.rewards.disco_reward"):
        assert remote(["a"], ["b"]) == remote(["a"], ["b"]) == [0.5]
    assert len(caplog.records) == 1 and "no siblings" in caplog.text


def test_grpo_logs_the_locations(reward, url, tiny_llama_dir, tiny_tokenizer, tmp_path):
    seen = []
    tiny_tokenizer.chat_template = "{{ style }}: " + tiny_tokenizer.chat_template  # the server's as well
    given = {"style": "short and careful"}

    def remember(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    trainer = GRPOTrainer(
        model=tiny_llama_dir,
        reward_funcs=[RemoteReward(url), remember],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=False,
            chat_template_kwargs=given,
        ),
        processing_class=tiny_tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [QUESTION, MESSAGES[0]] * 4}),
    )
    trainer.train()
    logged = [entry["rewards/disco_mean/mean"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(seen) == 2
    rewards = [reward.distribution(*batch, chat_template_kwargs=[given] * len(batch[0])) for batch in seen]
    close(logged, [of_batch.location.mean().item() for of_batch in rewards])


# verl


def loaded_by_path():
    """`disco_trl.serving.verl` as verl loads a `custom_reward_function.path`: a file, outside its package."""
    spec = importlib.util.spec_from_file_location("custom_module", disco_trl.serving.verl.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What verl's reward loop passes beside the four, and its older reward managers do not.
VERL_ARGUMENTS = {"reward_router_address": None, "reward_model_tokenizer": None}
PARQUET_PROMPT = np.array([{"role": "user", "content": "How is the film?", "tool_calls": None}], dtype=object)


@pytest.mark.parametrize("prompt", ["How is it? ", QUESTION, PARQUET_PROMPT], ids=["text", "messages", "parquet"])
@pytest.mark.parametrize("is_async", [False, True])
def test_verls_contract(reward, url, monkeypatch, prompt, is_async):
    module = loaded_by_path()
    monkeypatch.setenv("DISCO_TRL_URL", url + "/")
    row = {"data_source": "films", "ground_truth": "", "extra_info": {"prompt": prompt, "index": 3}, **VERL_ARGUMENTS}
    if is_async:
        assert inspect.iscoroutinefunction(module.compute_score_async)  # what verl asks, to await it

        async def score_all():
            return await asyncio.gather(
                *(module.compute_score_async(solution_str=answer, **row) for answer in ANSWERS)
            )

        found = asyncio.run(score_all())
    else:
        found = [module.compute_score(solution_str=answer, **row) for answer in ANSWERS]
    if isinstance(prompt, str):
        expected = reward.distribution([prompt] * 4, ANSWERS)
    else:
        expected = reward.distribution([QUESTION] * 4, MESSAGES)
    close([row["score"] for row in found], expected.location)
    close([row["location"] for row in found], expected.location)
    close([row["scale"] for row in found], expected.scale)


def test_verls_reward_kwargs_choose_the_transform(reward, url):
    found = disco_trl.serving.verl.compute_score(
        "films", ANSWERS[0], None, {"prompt": "How is it? "}, url=url, transform="lower_bound", k=2.0
    )
    close(found["score"], found["location"] - 2 * found["scale"])


def test_verls_errors_name_the_fix(url, monkeypatch):
    monkeypatch.delenv("DISCO_TRL_URL", raising=False)
    with pytest.raises(ValueError, match=r"extra_info\['prompt'\] is missing"):
        disco_trl.serving.verl.compute_score("films", "Good.", None, {"index": 3}, url=url)
    with pytest.raises(ValueError, match="set DISCO_TRL_URL"):
        disco_trl.serving.verl.compute_score("films", "Good.", None, {"prompt": "How?"})
    with pytest.raises(ServerError, match="no two of these are"):
        disco_trl.serving.verl.compute_score("films", "Good.", None, {"prompt": "How?"}, url=url, transform="win_rate")
