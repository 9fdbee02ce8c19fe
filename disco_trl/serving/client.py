"""Client of `disco-trl serve`: a reward model on another machine.

[`RemoteReward`] is a TRL reward function like [`DiscoReward`]. It requests only locations and scales from the server.
Rewards, groups and metrics are computed in the client by the same code as in [`DiscoReward`], so that the answers to
one prompt may be spread over requests and processes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
import torch
from requests.adapters import HTTPAdapter, Retry
from requests.auth import AuthBase

from ..data.columns import OVERALL
from ..data.tokenization import Content
from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import get_transform
from ..rewards.reward_function import RewardFunction, Scored
from .bearer_token import checked_token


class ServerError(RuntimeError):
    """Raised when the server does not answer or refuses a request. The message contains the URL and the reason."""


class _TokenAuth(AuthBase):
    """Sends the token, or nothing. A session with an `auth` never looks into `~/.netrc`."""

    def __init__(self, token: str | None):
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token is not None:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class ScoreClient:
    """Connection to `disco-trl serve`. It may be shared by threads.

    If the server is busy (503), the request is repeated after the time given in its `Retry-After` header. Scoring has
    no side effects, so a request is also repeated after a broken connection. Redirects are not followed.

    From the environment, proxies (`http_proxy`, `https_proxy`, `no_proxy`) and certificates (`REQUESTS_CA_BUNDLE`) are
    used as by any client, and passwords in `~/.netrc` are not: the token is the one given here.

    Args:
        url (`str`):
            URL of the server, such as `http://127.0.0.1:8000`. It may contain the token, as in
            `http://anyone:TOKEN@10.0.0.2:8000`.
        token (`str`, *optional*, defaults to `None`):
            Token that the server was started with. Whitespace around it is dropped.
        timeout (`float`, *optional*, defaults to `180.0`):
            Number of seconds to wait for each answer.
        retries (`int`, *optional*, defaults to `10`):
            Maximum number of times that a request is repeated.

    Raises:
        `ValueError`: If the token is empty, cannot be sent in a header, or differs from the one in the URL.
    """

    def __init__(self, url: str, token: str | None = None, timeout: float = 180.0, retries: int = 10):
        # The token is taken out of the URL, which error messages and logs show.
        self.url, in_url = _split_token(url)
        if token is not None:
            token = checked_token(token, "token")
        if None not in (token, in_url) and token != in_url:
            raise ValueError(f"the URL of {self.url} contains a token, and token= is another one; pass one of them")
        self.timeout = timeout
        self._session = requests.Session()
        self._session.auth = _TokenAuth(in_url if token is None else token)
        # By default urllib3 repeats only idempotent methods. `allowed_methods=None` includes POST, which is safe here
        # because scoring has no side effects. With `raise_on_status=False` the last 503 is returned as a response,
        # whose body holds the server's reason.
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
        """Requests `/health`.

        Returns:
            `dict`: Model name, family, attributes, default transform and view, and limits of the server.

        Raises:
            `ServerError`: If the server cannot be reached or refuses the request.
        """
        return self._request("GET", "/health")

    def score(self, **request: Any) -> dict[str, Any]:
        """Posts a request to `/score`.

        Args:
            **request:
                Fields of [`~disco_trl.serving.schemas.ScoreRequest`].

        Returns:
            `dict`: Fields of [`~disco_trl.serving.schemas.ScoreResponse`].

        Raises:
            `ServerError`: If the server cannot be reached or refuses the request.
        """
        return self._request("POST", "/score", json=request)

    def _request(self, method: str, path: str, **kwargs: Any) -> dict[str, Any]:
        try:
            response = self._session.request(
                method, self.url + path, timeout=self.timeout, allow_redirects=False, **kwargs
            )
        except requests.RequestException as error:
            raise ServerError(
                f"no answer from {self.url}{path}: {error}. Is `disco-trl serve` running there?"
            ) from error
        if response.is_redirect:
            # Following it would turn POST into GET, or send the token to another host.
            target = response.headers["Location"].removesuffix(path)
            raise ServerError(f"{self.url}{path} redirects to {target}: pass the URL of the server itself")
        try:
            answer = response.json()
        except (requests.JSONDecodeError, RecursionError):  # A proxy's error page, for instance
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


def _split_token(url: str) -> tuple[str, str | None]:
    """The URL without user and password, and the password, which is the token."""
    parts = urlsplit(url.rstrip("/"))
    if parts.password is None:
        return url.rstrip("/"), None
    token = checked_token(unquote(parts.password), "the password in the URL")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), token


class RemoteReward(RewardFunction):
    """[`DiscoReward`] whose model is behind `disco-trl serve`: `reward(prompts, completions, **columns)`.

    The server tokenizes with its own tokenizer, exactly as in training. Transforms, groups across processes, metrics
    and the logs of completions are those of [`DiscoReward`]. What requires the model in this process is missing: the
    metrics `scale/drift` and `shift/...`, the warning about answers unlike the training data, and the methods
    `tokenize` and `map`.

    Args:
        url (`str`):
            URL of the server, see [`ScoreClient`].
        transform (`str`, *optional*, defaults to `"mean"`):
            Name of the transform, see [`DiscoReward`].
        token (`str`, *optional*, defaults to `None`):
            Token that the server was started with.
        timeout (`float`, *optional*, defaults to `180.0`):
            Number of seconds to wait for each answer.
        name (`str`, *optional*, defaults to `None`):
            Name in TRL's logs, see [`~disco_trl.rewards.reward_function.RewardFunction`].
        attribute, weights, minimum, min_probability, floor (*optional*, defaults to `None`):
            Which reward is taken, of a model that knows several attributes, see [`DiscoReward`]. What is not given is
            as the server was started with; an empty `minimum` drops the server's.
        **options:
            Options of the transform, see [`DiscoReward`].

    Raises:
        `ValueError`: If the transform or an option is unknown, out of its domain, or undefined for the family of the
        server's model, or if the model does not know an attribute.
        `ServerError`: If the server cannot be reached or refuses a request, on creation or when called.

    Example:

    ```python
    >>> from disco_trl.serving.client import RemoteReward

    >>> reward = RemoteReward("http://10.0.0.2:8000", transform="lower_bound", k=1.0, token="...")
    >>> trainer = GRPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    ```
    """

    def __init__(
        self,
        url: str,
        transform: str = "mean",
        *,
        token: str | None = None,
        timeout: float = 180.0,
        name: str | None = None,
        attribute: str | None = None,
        weights: Mapping[str, float] | None = None,
        minimum: Mapping[str, float] | None = None,
        min_probability: float | None = None,
        floor: float | None = None,
        **options: Any,
    ):
        # Options are validated before the server is contacted.
        reward_transform = get_transform(transform, **options)
        self.client = ScoreClient(url, token, timeout)
        self.server = self.client.health()
        super().__init__(self.server["family"], reward_transform, name)
        asked = {
            "attribute": attribute,
            "weights": weights,
            "minimum": minimum,
            "min_probability": min_probability,
            "floor": floor,
        }
        self.view = {field: value for field, value in asked.items() if value is not None}
        known = [OVERALL, *self.server["attributes"]]
        for unknown in {*(weights or ()), *(minimum or ()), attribute or OVERALL} - {*known}:
            raise ValueError(
                f"the model of {self.client.url} does not know the attribute {unknown!r}; it knows "
                f"{', '.join(map(repr, known))}"
            )

    def _score(self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]) -> Scored:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; they go together row by row")
        results: list[dict[str, Any]] = []
        for items in self._requests(prompts, completions, columns):
            results += self.client.score(items=items, transform="mean", **self.view)["results"]
        location, scale = (torch.tensor([result[name] for result in results]) for name in ("location", "scale"))
        # A family without shape parameters and a model without a location error leave these fields null.
        known = {
            name: torch.tensor([result[name] for result in results])
            for name in ("shape", "location_error")
            if results and results[0][name] is not None
        }
        if self.view.get("minimum", self.server["view"]["minimum"]):
            known["cap"] = torch.tensor([math.inf if result["cap"] is None else result["cap"] for result in results])
        rewards = RewardDistribution(location, scale, self.family.name, **known)
        locations = {
            name: torch.tensor([result["attributes"][name]["location"] for result in results])
            for name in self.server["attributes"]
        }
        # The traits of the training rows are in the server's checkpoint: nothing to compare with here.
        return Scored(rewards, torch.empty(len(rewards), 0), locations)

    def _requests(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """The rows as items of `/score`, in requests as large as the server accepts."""
        most_texts, most_bytes = self.server["max_texts_per_request"], self.server["max_body_bytes"]
        room = most_bytes - 200  # leaves room for the JSON around the items
        items: list[dict[str, Any]] = []
        size = 0
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            item: dict[str, Any] = {"prompt": prompt, "completion": completion}
            for column in ("tools", "chat_template_kwargs"):
                if columns.get(column) is not None and columns[column][row] is not None:
                    item[column] = columns[column][row]
            # A column of tools may hold JSON, because Arrow cannot store schemas of different shapes in one column.
            if isinstance(item.get("tools"), str):
                item["tools"] = json.loads(item["tools"])
            item_size = len(json.dumps(item)) + 2  # with the separator
            if items and (len(items) == most_texts or size + item_size > room):
                yield items
                items, size = [], 0
            items.append(item)
            size += item_size
        if items:
            yield items
