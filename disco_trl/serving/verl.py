"""A custom reward function for verl that asks `disco-trl serve`.

verl calls it with one answer at a time, in many threads or coroutines at once; the server puts what waits together.
The prompt must be in the dataset's `extra_info`, as `prompt`: a text, or a list of messages. The answer comes as text,
without special tokens.

    DISCO_TRL_URL=http://10.0.0.2:8000 python -m verl.trainer.main_ppo ... \\
        reward.custom_reward_function.path=pkg://disco_trl.serving.verl \\
        reward.custom_reward_function.name=compute_score \\
        +reward.custom_reward_function.reward_kwargs.transform=lower_bound \\
        +reward.custom_reward_function.reward_kwargs.k=1.0

(verl loads the file by its path as well, outside the package: hence the absolute imports.)
"""

import asyncio
import functools
import os
from collections.abc import Mapping
from typing import Any

from disco_trl.serving.client import ScoreClient


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    url: str | None = None,
    token: str | None = None,
    timeout: float = 180.0,
    transform: str | None = None,
    k: float | None = None,
    q: float | None = None,
    beta: float | None = None,
    **unused: Any,
) -> dict[str, float]:
    """
    The reward of one answer.

    Args:
        data_source, ground_truth: verl's; a reward model needs neither.
        solution_str: the answer.
        extra_info: the row's, of which `prompt` is read.
        url, token: of the server; by default the environment's DISCO_TRL_URL and DISCO_TRL_TOKEN.
        timeout: seconds to wait for the answer.
        transform, k, q, beta: see `disco_trl.distributions.transforms`; by default the server's own. Not `"win_rate"`,
        for which verl would have to send the answers to a prompt together.
        **unused: what verl passes to every reward function (which arguments these are changes with its version).

    Returns:
        `score`, the transformed reward, which verl takes, with `location` and `scale`, which it logs.

    Raises:
        ValueError: if there is no prompt or no URL.
        disco_trl.serving.client.ServerError: if the server cannot be reached or refuses.
    """
    if extra_info is None or extra_info.get("prompt") is None:
        raise ValueError("extra_info['prompt'] is missing: put the prompt there (a text, or messages) in the dataset")
    url = url or os.environ.get("DISCO_TRL_URL")
    if url is None:
        raise ValueError(
            "the server's URL is missing: set DISCO_TRL_URL, or custom_reward_function.reward_kwargs.url, to that of "
            "`disco-trl serve`"
        )
    prompt = extra_info["prompt"]
    completion: Any = solution_str
    if not isinstance(prompt, str):
        # Out of Parquet a list is an array, and every message has the keys of all.
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        completion = [{"role": "assistant", "content": solution_str}]
    options = {"transform": transform, "k": k, "q": q, "beta": beta}
    answer = _client(url, token or os.environ.get("DISCO_TRL_TOKEN"), timeout).score(
        items=[{"prompt": prompt, "completion": completion}],
        **{name: value for name, value in options.items() if value is not None},
    )
    [result] = answer["results"]
    return {"score": result["reward"], "location": result["location"], "scale": result["scale"]}


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """`compute_score` for verl's asynchronous reward loop; arguments and errors are the same."""
    return await asyncio.to_thread(compute_score, data_source, solution_str, ground_truth, extra_info, **kwargs)


@functools.cache
def _client(url: str, token: str | None, timeout: float) -> ScoreClient:
    return ScoreClient(url, token, timeout)
