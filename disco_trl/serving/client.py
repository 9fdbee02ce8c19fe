"""A reward model on another machine: the client of `disco-trl serve`.

`RemoteReward` is a TRL reward function like `DiscoReward`. It asks the server for locations and scales only; rewards,
groups and metrics are worked out here, by the same code, so that a group of answers may straddle requests and
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter, Retry
from torch import Tensor

from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import get_transform
from ..rewards.reward_function import Content, RewardFunction


class ServerError(RuntimeError):
    """The server did not answer, or refused; the message says which and why."""


class ScoreClient:
    """A connection to `disco-trl serve`, which several threads may use.

    A busy server (503) is asked again when its `Retry-After` says; scoring changes nothing, so a broken connection is
    tried again as well.

    Args:
        url: of the server, such as `http://127.0.0.1:8000`.
        token: what the server was started with.
        timeout: seconds to wait for each answer.
        retries: how often a busy server is asked again.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 180.0, retries: int = 10):
        self.url = url.rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()
        if token is not None:
            self._session.headers["Authorization"] = f"Bearer {token}"
        retry = Retry(
            total=retries,
            connect=3,
            read=1,
            backoff_factor=0.1,
            status_forcelist=(503,),
            allowed_methods=None,
            respect_retry_after_header=True,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64, max_retries=retry))

    def health(self) -> dict[str, Any]:
        """What the server says of itself: its model, family and limits."""
        return self._request("GET", "/health")

    def score(self, **request: Any) -> dict[str, Any]:
        """The answer to POST /score; the arguments are the request's fields."""
        return self._request("POST", "/score", json=request)

    def _request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            response = self._session.request(method, self.url + path, timeout=self.timeout, **kwargs)
        except requests.RequestException as error:
            raise ServerError(
                f"no answer from {self.url}{path}: {error}. Is `disco-trl serve` running there?"
            ) from error
        try:
            answer = response.json()
        except (requests.JSONDecodeError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            if response.ok:
                raise ServerError(f"{self.url}{path} answered with no JSON object: this is not `disco-trl serve`")
            answer = {}
        if not response.ok:
            reason = answer.get("error", response.reason)
            about = f"{answer['field']}: " if answer.get("field") else ""
            raise ServerError(f"{self.url}{path} answered {response.status_code}: {about}{reason}")
        return answer


class RemoteReward(RewardFunction):
    """`DiscoReward` with its model behind `disco-trl serve`: ``reward(prompts, completions, **columns)``.

    The server tokenizes as training did, with its own tokenizer. Transforms, groups across processes, metrics and
    completions' logs are those of `DiscoReward`, except what needs the model at hand: `scale/drift` and `shift/...`,
    the warning about answers unlike the training rows, and the methods `tokenize` and `map`.

    Args:
        url: of the server.
        transform, name, **options: as for `DiscoReward`.
        token, timeout: as for `ScoreClient`.

    Raises:
        ValueError: as `DiscoReward` does, on a wrong transform or option.
        ServerError: if the server cannot be reached, here or when called, or refuses.

    Example:
        >>> from disco_trl.serving.client import RemoteReward
        >>> reward = RemoteReward("http://10.0.0.2:8000", transform="lower_bound", k=1.0, token="...")
        >>> trainer = GRPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    """

    def __init__(
        self,
        url: str,
        transform: str = "mean",
        *,
        token: str | None = None,
        timeout: float = 180.0,
        name: str | None = None,
        **options: Any,
    ):
        reward_transform = get_transform(transform, **options)  # before a server is asked
        self.client = ScoreClient(url, token, timeout)
        self.server = self.client.health()
        super().__init__(self.server["family"], reward_transform, name)

    def _rewards_and_traits(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]
    ) -> tuple[RewardDistribution, Tensor]:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; they go together row by row")
        found: dict[str, list[Any]] = {name: [] for name in ("location", "scale", "shape", "location_error")}
        for items in self._requests(prompts, completions, columns):
            for result in self.client.score(items=items, transform="mean")["results"]:
                for name, values in found.items():
                    values.append(result.get(name))
        location, scale = (torch.tensor(found.pop(name)) for name in ("location", "scale"))
        # What this family or model has no number for
        known = {name: torch.tensor(values) for name, values in found.items() if values and None not in values}
        rewards = RewardDistribution(location, scale, self.family.name, **known)
        return rewards, torch.empty(len(rewards), 0)

    def _requests(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows as items of `/score`, as many at once as the server takes."""
        most_texts, most_bytes = self.server["max_texts_per_request"], self.server["max_body_bytes"]
        room = most_bytes - 200  # for what stands around the items
        items: list[dict[str, Any]] = []
        size = 0
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            item: dict[str, Any] = {"prompt": prompt, "completion": completion}
            for column in ("tools", "chat_template_kwargs"):
                if columns.get(column) is not None and columns[column][row] is not None:
                    item[column] = columns[column][row]
            if isinstance(item.get("tools"), str):
                item["tools"] = json.loads(item["tools"])
            item_size = len(json.dumps(item)) + 2
            if items and (len(items) == most_texts or size + item_size > room):
                yield items
                items, size = [], 0
            items.append(item)
            size += item_size
        if items:
            yield items
