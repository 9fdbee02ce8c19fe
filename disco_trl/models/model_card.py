"""The card of a trained reward model: what its rewards are and how to load them, and how good they are."""

import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import get_config_model_id

from .modeling import DiscoRewardModel


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
) -> ModelCard:
    """
    The card of a model.

    Args:
        model (`DiscoRewardModel` or `PeftModel` around one): what was trained.
        model_name: its title.
        hub_model_id: where it was pushed to; None if it was not.
        dataset_name: of the preferences.
        tags: for the card's metadata.
        metrics: of the last evaluation, by name.
    """
    is_adapter = is_peft_model(model)
    reward_model: DiscoRewardModel = model.get_base_model() if is_adapter else model
    model_id = get_config_model_id(model.config)
    base_model = None if Path(model_id).is_dir() else model_id  # a local path says nothing to others
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
        is_adapter=is_adapter,
        metrics=metrics,
        versions={name: version(name) for name in PACKAGES},
    )


def add_evaluation(folder: Path, text: str, pictures: list[Path]) -> None:
    """
    Put what an evaluation has found into the card of a model, in the place of what was found before.

    Args:
        folder: the model's.
        text: Markdown.
        pictures: files to copy beside the card and show after the text.

    Raises:
        FileNotFoundError: the folder has no card.
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
