"""The reward model: a stock sequence classifier of transformers whose last layer gives a distribution.

Only the last `nn.Linear` of the classifier changes. It becomes a [`~disco_trl.models.heads.DiscoHead`]: the same
layer, with the same weight under the same name (the location row), and a few submodules. To any other tool a saved
checkpoint is therefore a scalar reward model, whose extra keys it ignores; and `model(**inputs).logits` and
`model.score(hidden_states)` of a live model are the location.

Each architecture pools in its own way, and a checkpoint that the stock class has to load must be pooled in the same
way. The stock `forward` therefore runs with the head bypassed. Whether it selects the logits of one token or averages
those of all, it then does so to the hidden states, and the head is applied to what remains. This is exact as long as
pooling is linear in the logits, which is why only some layers are supported (`disco_trl.models.architectures`).
"""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from ..data.columns import OVERALL
from ..data.forest import Nodes
from ..distributions.reward_distribution import Family, get_family
from .architectures import check_summary, find_head
from .attribute_heads import AttributeHead, AttributeHeads
from .epistemic_head import EpistemicHead
from .heads import DiscoHead, heads_bypassed
from .likelihood_head import LikelihoodHead, difference_quantile
from .loading import load_reward_model
from .outputs import OWN_OUTPUTS, STOCK_OUTPUTS, RewardModelOutput, overall
from .prefix_sharing import as_attention_mask
from .reward_head import ShapeHead
from .reward_reader import RewardReader
from .reward_view import RewardView
from .scalar import ScalarReward
from .scale_head import ScaleHead
from .scale_layer import (
    hook_layer,
    last_places,
    last_tokens,
    latest,
    mean_over_paths,
    mean_over_tokens,
    reading,
    tokens_to_read,
)
from .settings import attribute_likelihoods, resolve_settings


OWN_MODULES = (ScaleHead, ShapeHead, LikelihoodHead, EpistemicHead, AttributeHead, AttributeHeads)
"""Modules that the stock class does not know how to initialize."""


if TYPE_CHECKING:
    _Stock = PreTrainedModel  # every instance is one: `disco_class` adds the stock class as the second base
else:
    _Stock = object


class DiscoRewardModel(RewardReader, _Stock):
    """
    A sequence classifier that returns a reward distribution for each answer.

    It is not instantiated directly. [`DiscoRewardModel.from_pretrained`] returns an instance of a subclass of both
    this class and the stock class of the checkpoint's architecture, with the name and the forward signature of the
    latter.

    Attributes:
        family (`Family`):
            Family of the rewards.
        head_name (`str`):
            Name of the head, such as `"score"`.
        unquantized_modules (`tuple[str, ...]`):
            Patterns of the modules that quantization has to skip: everything after the backbone, and the pooler of an
            encoder. In a base model they are newly initialized, and a quantized layer can be neither initialized nor
            trained.
        has_summary (`bool`):
            Whether the classifier sums up a text as `summary_type` in its config says.
        newly_initialized (`tuple[str, ...]`):
            Names of the modules that the checkpoint did not contain, such as the head of a base model and the pooler
            of an encoder. They have to be trained, and saved whole, or rewards are random.

    Example:

    ```python
    >>> from disco_trl import DiscoRewardModel
    >>> from transformers import AutoTokenizer

    >>> model = DiscoRewardModel.from_pretrained("my-reward-model")
    >>> tokenizer = AutoTokenizer.from_pretrained("my-reward-model")
    >>> reward = model.reward_distribution(**tokenizer(["Paris.", "Lyon."], padding=True, return_tensors="pt"))
    >>> reward.location, reward.scale, reward.quantile(0.05)
    ```
    """

    family: Family
    head_name: str
    unquantized_modules: tuple[str, ...]
    has_summary: bool
    newly_initialized: tuple[str, ...] = ()
    _scale_layer_hooks: Sequence[Any] = ()  # handles of hooks

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.convert_heads(resolve_settings(getattr(config, "disco", None)))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        reward_family: str | None = None,
        fixed_scale: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a reward model, or start a new one from a language model.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Hub id or directory of a disco checkpoint; of a scalar reward model, whose head becomes the location
                row; of a base language model, which gets a new head; or of a PEFT adapter, whose base model is loaded
                with it.
            reward_family (`str`, *optional*):
                Name of the family: `"normal"`, `"cauchy"`, `"logistic"`, `"laplace"`, `"mixture"`, or any other
                registered family. By default that of the checkpoint, or `"normal"`.
            fixed_scale (`float`, *optional*):
                Scale of every reward, in reward units, in place of a learned one. By default the setting of the
                checkpoint.
            **kwargs:
                Arguments of `AutoModelForSequenceClassification.from_pretrained` (`dtype`, `device_map`,
                `quantization_config`, `revision`, ...). `is_trainable=True` continues the training of an adapter.

        Returns:
            [`DiscoRewardModel`] or [`~peft.PeftModel`]: The model; for an adapter, the `PeftModel` around it.

        Raises:
            `ValueError`: If the architecture has no scalar head, if the head or the scale of a reward model is missing
                from its files, or if `reward_family` or `fixed_scale` contradict the checkpoint.
        """
        if cls is not DiscoRewardModel:  # a concrete class loads as any class of transformers does
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model, _ = load_reward_model(
            pretrained_model_name_or_path, disco_class, reward_family=reward_family, fixed_scale=fixed_scale, **kwargs
        )
        return model

    def as_scalar(self, transform: str = "mean", view: RewardView | None = None, **options: Any) -> nn.Module:
        """
        Wrap this model so that its reward is a number, for the argument `reward_model` of PPO.

        Args:
            transform (`str`, *optional*, defaults to `"mean"`):
                Name of the transform that maps a distribution to a number, such as `"lower_bound"`; see
                `disco_trl.distributions.transforms`.
            view ([`~disco_trl.models.reward_view.RewardView`], *optional*):
                Which reward, of a model that knows several attributes. By default the overall one.
            **options:
                Options of the transform, such as `k=1.0`.

        Returns:
            [`~disco_trl.models.scalar.ScalarReward`]: A module around this model, which is not copied.

        Raises:
            `ValueError`: If the transform needs groups of answers or does not exist for the family, or if the model is
                an encoder.
        """
        return ScalarReward(self, transform, view, **options)

    def named_reward_heads(self) -> Iterator[tuple[str, DiscoHead]]:
        """Iterate over the name and module of the head and of the copies that PEFT keeps of it."""
        block = self.head_name.split(".")[0]
        for name, module in getattr(self, block).named_modules(prefix=block):
            # PEFT moves a module that it trains whole to `original_module`, and its copies to `modules_to_save`.
            stock_name = re.sub(r"\.(original_module|modules_to_save\.[^.]+)", "", name)
            if stock_name == self.head_name and isinstance(module, nn.Linear):
                yield name, cast(DiscoHead, module)

    def convert_heads(self, settings: dict[str, Any]) -> None:
        """
        Turn the head and its copies into new heads with these settings. The location row is kept.

        Args:
            settings (`dict`):
                What [`~disco_trl.models.settings.resolve_settings`] returns; it becomes `config.disco`.
        """
        self.family = family = get_family(settings["reward_family"])
        for _, layer in self.named_reward_heads():
            head = DiscoHead.convert(layer, family.unit_scale, settings["fixed_scale"], len(family.shape_names))
            if "likelihood" in settings:
                head.add_likelihood(settings["likelihood"])
            if "epistemic" in settings:
                head.add_epistemic(settings["epistemic"])
            if "attributes" in settings:
                head.add_attributes(settings["attributes"])
                for name, likelihood in attribute_likelihoods(settings).items():
                    of_attribute = head.by_attribute()[name]
                    of_attribute.add_likelihood(likelihood)
                    if "epistemic" in settings:
                        of_attribute.add_epistemic(settings["epistemic"])
        self.config.disco = settings
        self._apply_scale_layer()
        ignored = getattr(self.config, "keys_to_ignore_at_inference", [])
        stock = [key for key in ignored if key not in OWN_OUTPUTS]
        self.config.keys_to_ignore_at_inference = [*stock, *OWN_OUTPUTS]

    @property
    def scale_layer(self) -> int | None:
        """Layer whose mean hidden state the scale reads, or `None` if it reads the pooled last hidden state."""
        return self.config.disco.get("scale_layer")

    def set_scale_layer(self, layer: int | None) -> None:
        """
        Choose what the scale reads, in a model whose scale has not been learned yet.

        Args:
            layer (`int`, *optional*):
                Number of a layer, from 1: the scale then reads the mean of the hidden states after it over the tokens
                of the text. `None` for the pooled last hidden state. See `disco_trl.models.scale_layer`, also for a
                default.

        Raises:
            `ValueError`: If the scale has been learned from other states; if it is fixed, and reads none; or if the
                model has no such layer.
        """
        if layer == self.scale_layer:
            return
        where = self.config._name_or_path or type(self).__name__
        heads = [head for _, head in self.named_reward_heads()]
        if layer is not None and self.scale_head.fixed_scale is not None:
            raise ValueError(
                f"{where}: its scale is fixed at {self.scale_head.fixed_scale:g} and reads nothing; leave scale_layer "
                "out"
            )
        if not all(part.scale.is_constant for head in heads for part in head.by_attribute().values()):
            raise ValueError(
                f"{where}: scale_layer={layer!r} contradicts the model, whose scale has been learned with "
                f"scale_layer={self.scale_layer!r}; leave it out to go on with that, or start from a model without a "
                "learned scale"
            )
        before = self.config.disco
        self.config.disco = {name: value for name, value in before.items() if name != "scale_layer"}
        if layer is not None:
            self.config.disco["scale_layer"] = layer
        try:
            self._apply_scale_layer()
        except ValueError:
            self.config.disco = before
            self._apply_scale_layer()
            raise
        for head in heads:  # a constant scale may have seen rows, of which the moments are those of other states
            for part in head.by_attribute().values():
                part.scale.reset_buffers()

    def _apply_scale_layer(self) -> None:
        for hook in self._scale_layer_hooks:
            hook.remove()
        self._scale_layer_hooks = () if self.scale_layer is None else hook_layer(self, self.scale_layer)
        for _, head in self.named_reward_heads():
            for part in head.by_attribute().values():
                part.scale.layer = self.scale_layer

    def add_attributes(self, settings: dict[str, Any]) -> None:
        """
        Have the model give rewards for attributes as well. Its overall reward stays as it is.

        Args:
            settings (`dict`):
                `"names"`, `"weights"`, `"likelihoods"`, `"are_learned"` and `"has_rest"`, see
                [`~disco_trl.models.attribute_heads.AttributeHeads`]; the likelihoods are settings of a
                [`~disco_trl.models.likelihood_head.LikelihoodHead`] for each attribute.
        """
        self.config.disco = {**self.config.disco, "attributes": settings}
        for _, head in self.named_reward_heads():
            head.add_attributes(settings, is_new=self.head_name in self.newly_initialized)
            for name, likelihood in attribute_likelihoods(self.config.disco).items():
                head.by_attribute()[name].add_likelihood(likelihood)

    def keep_only(self, attribute: str) -> None:
        """
        Become a model of the reward for one attribute, in place, which is its overall reward from then on.

        Args:
            attribute (`str`):
                Name of the attribute, or `"overall"`, which forgets the others.

        Raises:
            `ValueError`: If the model does not know the attribute.
        """
        RewardView(attribute=attribute).of_nothing(self)
        settings = {
            name: value for name, value in self.config.disco.items() if name not in ("attributes", "likelihood")
        }
        if likelihood := self.likelihoods[attribute]:
            settings["likelihood"] = likelihood
        for _, head in self.named_reward_heads():
            head.keep_only(attribute)
        self.config.disco = settings

    def keep_sum(self, weights: Mapping[str, float]) -> None:
        """
        Become a model of the location of a weighted sum of attributes, in place.

        The scale is left as it is, and is not that of the sum.

        Args:
            weights (`Mapping[str, float]`):
                Weights by the names of attributes.

        Raises:
            `ValueError`: If the model does not know an attribute, or if all weights are 0.
        """
        RewardView(weights=weights).of_nothing(self)
        for _, head in self.named_reward_heads():
            head.keep_sum(weights)
        self.config.disco = {name: value for name, value in self.config.disco.items() if name != "attributes"}

    def add_epistemic(self, max_directions: int) -> None:
        """
        Add an [`~disco_trl.models.epistemic_head.EpistemicHead`] to each head, to be fitted when training ends.

        Args:
            max_directions (`int`):
                Largest number of directions; there are never more than the hidden state has dimensions.
        """
        rank = min(max_directions, self.reward_head.in_features)
        for _, head in self.named_reward_heads():
            for part in head.by_attribute().values():
                part.add_epistemic(rank)
        self.config.disco = {**self.config.disco, "epistemic": rank}

    def init_thresholds(self, ratings: Mapping[float, int], attribute: str = OVERALL) -> None:
        """
        Place the thresholds where equal rewards for all answers would give the ratings of the training data.

        Thresholds that a checkpoint has learned are kept.

        Args:
            ratings (`Mapping[float, int]`):
                How often each rating value occurs.
            attribute (`str`, *optional*, defaults to `"overall"`):
                Attribute that is rated.
        """
        family = self.family
        shape = family.shape_from_raw(torch.zeros(len(family.shape_names), dtype=torch.float64))
        for _, head in self.named_reward_heads():
            likelihood = cast(LikelihoodHead, head.by_attribute()[attribute].likelihood)
            if not likelihood.get_parameter("thresholds").any():
                counts = [ratings.get(value, 0) for value in likelihood.settings["rating_values"]]
                likelihood.init_thresholds(counts, lambda levels: family.quantile(levels, shape))

    def init_strengths(self, strengths: Mapping[int, int], attribute: str = OVERALL) -> None:
        """
        Place the boundaries between strengths where equal rewards for all answers would give the training data's.

        Boundaries that a checkpoint has learned are kept.

        Args:
            strengths (`Mapping[int, int]`):
                How often a preference of each strength occurs, in either direction; 0 stands for a tie.
            attribute (`str`, *optional*, defaults to `"overall"`):
                Attribute that is compared.
        """
        quantile = difference_quantile(self.family)
        for _, head in self.named_reward_heads():
            likelihood = cast(LikelihoodHead, head.by_attribute()[attribute].likelihood)
            if not likelihood.get_parameter("strength_boundaries").any():
                levels = range(likelihood.settings["strength_levels"] + 1)
                likelihood.init_strengths([strengths.get(level, 0) for level in levels], quantile)

    def _init_weights(self, module: nn.Module) -> None:
        # Without this, transformers 5 leaves parameters that a checkpoint does not contain as uninitialized memory.
        if isinstance(module, OWN_MODULES):
            module.init_weights()
            return
        kind = type(module)
        if kind is DiscoHead:  # Funnel tells a linear layer by the name of its class
            module.__class__ = nn.Linear
        super()._init_weights(module)
        module.__class__ = kind


def _distribution_forward(stock: type[PreTrainedModel]) -> Any:
    """Make the `forward` of a disco class. `nodes` and `read_at` come from `disco_trl.data.forest.pack`."""

    positional = [*inspect.signature(stock.forward).parameters][1:]

    @functools.wraps(stock.forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        nodes: Nodes | None = None,
        read_at: Tensor | None = None,
        **kwargs: Any,
    ) -> RewardModelOutput | tuple[Tensor, ...]:
        given: dict[str, Any] = {**dict(zip(positional, args, strict=False)), **kwargs}
        names = ("input_ids", "inputs_embeds", "attention_mask")
        tokens, embeddings, mask = (cast(Any, given.get(name)) for name in names)
        last = None  # where the reward of each row is read, if it is at one of its tokens
        with reading() as states:
            if nodes is not None:
                # A forest is not continued, so no cache is needed.
                mask = as_attention_mask(nodes, cast(Tensor, read_at).device)
                kwargs |= {"attention_mask": mask, "use_cache": False}
                output = getattr(self, self.base_model_prefix)(*args, return_dict=True, **kwargs)
                pooled = output.last_hidden_state[0, cast(Tensor, read_at).to(output.last_hidden_state.device)]
            elif embeddings is not None and mask is not None and self.head_name == "score":
                # Adapters that learn a prompt pass embeddings, in which the stock pooling of a decoder does not see
                # the padding: it reads the last position, and the reward of a text would depend on its batch.
                output = getattr(self, self.base_model_prefix)(*args, return_dict=True, **kwargs)
                hidden_states = output.last_hidden_state
                last = last_places(mask.ne(0)).to(hidden_states.device)
                pooled = hidden_states[torch.arange(len(last), device=hidden_states.device), last]
            else:
                with heads_bypassed():
                    output = stock.forward(self, *args, return_dict=True, **kwargs)
                pooled = output.logits
                if tokens is not None and self.head_name == "score":
                    last = last_tokens(tokens, self.config.get_text_config().pad_token_id)
        scale_states = None
        if self.scale_layer is not None:
            kept = latest(states, self, (embeddings if tokens is None else tokens).shape[:2])
            if nodes is not None:
                scale_states = mean_over_paths(kept, mask.forest_layout.tokens_up_to(read_at))
            else:
                scale_states = mean_over_tokens(kept, tokens_to_read(kept.shape[:2], mask, last, kept.device))
        # By position, because DeepSpeed looks at no other arguments of a module.
        head = self.reward_head(pooled, True, scale_states)
        loss = None if labels is None else F.mse_loss(overall(head.location), labels.to(head.location).reshape(-1))
        handed_on = {name: output[name] for name in STOCK_OUTPUTS if name in output}
        result = RewardModelOutput.from_head(head, pooled, scale_states, loss=loss, **handed_on)
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()

    return forward


_CLASSES: dict[type[PreTrainedModel], type[DiscoRewardModel]] = {}


def disco_class(stock: type[PreTrainedModel], config: PreTrainedConfig) -> type[DiscoRewardModel]:
    """
    Make the class of a disco model from a stock class, once for each architecture.

    The class keeps the name and the module of the stock class. `save_pretrained` writes the name into
    `config.architectures`, and transformers reads the source of the module to see what its attention supports.

    Args:
        stock (`type[PreTrainedModel]`):
            Sequence classifier of transformers.
        config ([`~transformers.PreTrainedConfig`]):
            Config of the model, with one label.

    Returns:
        `type[DiscoRewardModel]`: Subclass of [`DiscoRewardModel`] and `stock`.

    Raises:
        `ValueError`: If the classifier does not end in a single linear layer, or reads a text at a place that depends
            on its batch.
    """
    if stock not in _CLASSES:
        head_name, unquantized_modules, has_summary = find_head(stock, config)
        _CLASSES[stock] = type(
            stock.__name__,
            (DiscoRewardModel, stock),
            {
                "__module__": stock.__module__,
                "__doc__": DiscoRewardModel.__doc__,
                "head_name": head_name,
                "unquantized_modules": unquantized_modules,
                "has_summary": has_summary,
                "forward": _distribution_forward(stock),
                "_keep_in_fp32_modules_strict": {*(stock._keep_in_fp32_modules_strict or ()), head_name},
                # Every missing key has to be reported. TRL (1.12 to 1.16) ignores `score.weight` while it loads.
                "_keys_to_ignore_on_load_missing": None,
            },
        )
    kind = _CLASSES[stock]
    if kind.has_summary:
        check_summary(stock, config, kind.head_name)
    return kind
