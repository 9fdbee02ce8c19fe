"""Custom reward function for verl that queries `disco-trl serve`.

verl calls it with one answer at a time, from many threads or coroutines at once, and the server batches the calls. The
dataset's `extra_info` has to contain the prompt as `prompt`: a text, or a list of messages. The answer arrives as text
without special tokens.

    DISCO_TRL_URL=http://10.0.0.2:8000 python -m verl.trainer.main_ppo ... \\
        reward.custom_reward_function.path=pkg://disco_trl.serving.verl \\
        reward.custom_reward_function.name=compute_score \\
        +reward.custom_reward_function.reward_kwargs.transform=lower_bound \\
        +reward.custom_reward_function.reward_kwargs.k=1.0

The imports are absolute because verl may also load this file by its path, outside the package.
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
    attribute: str | None = None,
    weights: Mapping[str, float] | None = None,
    minimum: Mapping[str, float] | None = None,
    min_probability: float | None = None,
    floor: float | None = None,
    **unused: Any,
) -> dict[str, float]:
    """Scores one answer.

    Args:
        data_source (`str`):
            Name of verl's data source. Not used.
        solution_str (`str`):
            Answer, without special tokens.
        ground_truth (`Any`):
            Reference answer of the dataset. Not used: a reward model needs none.
        extra_info (`Mapping[str, Any]`):
            Extra columns of the row, of which `prompt` is read.
        url (`str`, *optional*, defaults to `None`):
            URL of the server. If `None`, the environment variable `DISCO_TRL_URL`.
        token (`str`, *optional*, defaults to `None`):
            Token of the server. If `None`, the environment variable `DISCO_TRL_TOKEN`.
        timeout (`float`, *optional*, defaults to `180.0`):
            Number of seconds to wait for the answer.
        transform (`str`, *optional*, defaults to `None`):
            Name of a transform, see `disco_trl.distributions.transforms`. If `None`, the server's own. `"win_rate"` is
            not supported, because verl sends the answers to one prompt separately.
        k, q, beta (`float`, *optional*, defaults to `None`):
            Options of the transform.
        attribute, weights, minimum, min_probability, floor (*optional*, defaults to `None`):
            Which reward is taken, of a model that knows several attributes, see [`~disco_trl.DiscoReward`]. If `None`,
            as the server was started with.
        **unused:
            Further arguments that verl passes to every reward function. They vary between its releases.

    Returns:
        `dict[str, float]`: `score`, the transformed reward, which verl uses, and `location` and `scale`, which it
        logs, with `location_NAME` for each attribute that the model knows.

    Raises:
        `ValueError`: If the prompt or the URL is missing.
        `disco_trl.serving.client.ServerError`: If the server cannot be reached or refuses the request.
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
        # Parquet returns a list as an array, and fills up each message with the keys of the others, set to None.
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
        completion = [{"role": "assistant", "content": solution_str}]
    options: dict[str, Any] = {"transform": transform, "k": k, "q": q, "beta": beta, "attribute": attribute}
    options |= {"min_probability": min_probability, "floor": floor}
    # From the command line of verl they are no dicts.
    options |= {name: dict(given) for name, given in (("weights", weights), ("minimum", minimum)) if given is not None}
    answer = _client(url, token or os.environ.get("DISCO_TRL_TOKEN"), timeout).score(
        items=[{"prompt": prompt, "completion": completion}],
        **{name: value for name, value in options.items() if value is not None},
    )
    [result] = answer["results"]
    found = {"score": result["reward"], "location": result["location"], "scale": result["scale"]}
    attributes = (result["attributes"] or {}).items()
    return found | {f"location_{name}": of_attribute["location"] for name, of_attribute in attributes}


async def compute_score_async(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    """[`compute_score`] for verl's asynchronous reward loop. Arguments, result and errors are the same."""
    # `requests` blocks, so that the call runs in a thread and the event loop stays free for the other answers.
    return await asyncio.to_thread(compute_score, data_source, solution_str, ground_truth, extra_info, **kwargs)


@functools.cache  # verl calls for each answer anew; the connection pool is to be shared.
def _client(url: str, token: str | None, timeout: float) -> ScoreClient:
    return ScoreClient(url, token, timeout)
