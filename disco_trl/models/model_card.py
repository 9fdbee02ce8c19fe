"""The model card of a trained reward model: what its rewards mean, how to load it, and how good it is."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import get_config_model_id

from .._version import versions_of
from ..distributions.numerics import is_identity
from .distributed import is_in_shards
from .modeling import DiscoRewardModel
from .scale_head import ScaleHead


TEMPLATE = Path(__file__).with_suffix(".md")
EVALUATION = re.compile("<!-- evaluation -->.*<!-- end of evaluation -->\n", re.DOTALL)
PACKAGES = ("disco-trl", "trl", "transformers", "torch", "datasets")


def make_model_card(
    model: Any,
    *,
    model_name: str | None,
    hub_model_id: str | None,
    dataset_name: str | None,
    tags: set[str],
    metrics: dict[str, float],
    calibration_factor: float | None = None,
) -> ModelCard:
    """
    Make the card of a model.

    Args:
        model ([`~disco_trl.DiscoRewardModel`] or [`~peft.PeftModel`]):
            The trained model.
        model_name (`str`, *optional*):
            Title of the card.
        hub_model_id (`str`, *optional*):
            Repository that the model was pushed to.
        dataset_name (`str`, *optional*):
            Name of the training data.
        tags (`set[str]`):
            Tags in the metadata of the card.
        metrics (`dict[str, float]`):
            Metrics of the last evaluation.
        calibration_factor (`float`, *optional*):
            Factor that the locations were multiplied by when training ended. If `None`, they were not calibrated.

    Returns:
        `huggingface_hub.ModelCard`: The card.
    """
    is_adapter = is_peft_model(model)
    reward_model: DiscoRewardModel = model.get_base_model() if is_adapter else model
    model_id = get_config_model_id(model.config)
    base_model = None if Path(model_id).is_dir() else model_id  # a local path means nothing to others
    card_data = ModelCardData(
        base_model=base_model,
        datasets=dataset_name,
        library_name="peft" if is_adapter else "transformers",
        model_name=model_name,
        tags=sorted(tags),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        model_name=model_name,
        base_model=base_model,
        hub_model_id=hub_model_id,
        dataset_name=dataset_name,
        family=reward_model.family,
        fixed_scale=reward_model.config.disco["fixed_scale"],
        scale_layer=reward_model.scale_layer,
        attributes=_attributes(reward_model),
        constant_scale=_constant_scale(reward_model.scale_head),
        is_adapter=is_adapter,
        metrics=metrics,
        calibration_factor=calibration_factor,
        versions=versions_of(PACKAGES),
    )


def _constant_scale(head: ScaleHead) -> float | None:
    """The learned scale that all answers have, or `None` if it varies or is fixed, or is in shards."""
    if head.fixed_scale is not None or is_in_shards(head.weight):
        return None
    return head.level if head.is_constant else None


def _attributes(model: DiscoRewardModel) -> dict[str, Any] | None:
    """What the card says of the attributes, or `None` if the model knows none."""
    heads = model.reward_head.attributes
    if heads is None:
        return None
    # Learned weights may be in shards.
    weights = dict.fromkeys(heads.names) if is_in_shards(heads.raw_weight) else model.attribute_weights
    each = [
        {
            "name": " ".join(name.split()).replace("|", "\\|"),  # as a cell of a table
            "weight": weights[name],
            "rating_values": [f"{value:g}" for value in model.likelihoods[name].get("rating_values", ())],
        }
        for name in heads.names
    ]
    first = heads.names[0]
    return {
        "each": each,
        "has_rest": not model.is_weighted_sum,
        "correlation": None if is_identity(heads.correlation) else heads.correlation.tolist(),
        "first": repr(first),
        "first_in_shell": shlex.quote(first),
        "weights": repr({name: float(f"{start:.4g}") for name, start in zip(heads.names, heads.start, strict=True)}),
    }


def add_evaluation(folder: Path, text: str, pictures: list[Path]) -> None:
    """
    Write the results of an evaluation into the card of a model. Those of an earlier evaluation are replaced.

    Args:
        folder (`Path`):
            Folder of the model.
        text (`str`):
            Results, in Markdown.
        pictures (`list[Path]`):
            Pictures, which are copied beside the card and shown after the text.

    Raises:
        `FileNotFoundError`: If the folder has no card.
    """
    card = folder / "README.md"
    if not card.is_file():
        raise FileNotFoundError(f"{card}: there is no such file; --card writes into the card of a model in a folder")
    shown = "".join(f"![{picture.stem}]({picture.name})\n" for picture in pictures)
    section = f"<!-- evaluation -->\n### On held-out data\n\n{text}\n\n{shown}<!-- end of evaluation -->\n"
    before = card.read_text(encoding="utf-8")
    if EVALUATION.search(before):
        after = EVALUATION.sub(lambda _: section, before)
    elif "\n## Training\n" in before:
        after = before.replace("\n## Training\n", f"\n{section}\n## Training\n", 1)
    else:
        after = f"{before.rstrip()}\n\n{section}"
    for picture in pictures:
        shutil.copyfile(picture, folder / picture.name)
    card.write_text(after, encoding="utf-8")
