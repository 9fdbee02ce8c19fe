"""Test epistemic uncertainty: location errors on text like the training data, and on unfamiliar text.

Run as:

    python -m benchmarks.unfamiliar_text runs/compare-tweets/normal-0/model --output runs/unfamiliar

The models are checkpoints that were trained on rated tweets with `epistemic=True`. They score held-out tweets and 300
texts of each of these kinds: sentences of film reviews, lines of Python's standard library, messages of a web
framework in other languages, and random tokens. For each kind the table has the location error and how well it
separates the kind from held-out tweets (AUROC), and the same for the scale, which is not made for that.
"""

import argparse
import gettext
import inspect
import io
import json
import pkgutil
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer

from disco_trl import RewardDistribution
from disco_trl.data.tokenization import tokenize
from disco_trl.evaluation.forecasts import Forecasts
from disco_trl.evaluation.metrics import accuracy, negative_log_likelihood
from disco_trl.models.inference import load_trained, score

from . import human_ratings
from .downloads import Release, fetch


TWEETS = "held-out tweets"
TEXTS = 300
MESSAGES = Release(
    requirement="Django==5.2.8",
    filename="django-5.2.8-py3-none-any.whl",
    sha256="37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
)
MODULES = ("argparse", "ast", "asyncio.tasks", "collections", "dataclasses", "datetime", "difflib", "email.message")


def messages_in_other_languages() -> list[str]:
    """Messages without placeholders, in every language but English."""
    found: set[str] = set()
    with zipfile.ZipFile(fetch(MESSAGES)) as wheel:
        for name in wheel.namelist():
            language = re.fullmatch(r"django/conf/locale/(\w+)/LC_MESSAGES/django\.mo", name)
            if language and not language[1].startswith("en"):
                catalog = gettext.GNUTranslations(io.BytesIO(wheel.read(name)))._catalog  # type: ignore[attr-defined]
                texts = {text.strip() for key, text in catalog.items() if isinstance(key, str) and key != text}
                found |= {text for text in texts if 20 <= len(text) <= 200 and not set("%<\n") & set(text)}
    return sorted(found)


def lines_of_code() -> list[str]:
    """Lines of Python code of 30 to 120 characters."""
    sources = [inspect.getsource(pkgutil.resolve_name(name)) for name in MODULES]
    lines = {line.strip() for source in sources for line in source.splitlines()}
    return sorted(line for line in lines if 30 <= len(line) <= 120 and re.search(r"[=(\[]", line))


def kinds_of_text(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Token sequences of each kind of text."""
    generator = np.random.default_rng(0)
    _, tweets = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))
    _, movies = human_ratings.split_by_text(human_ratings.load_ratings("movies"))
    texts = {
        TWEETS: [row.text for row in tweets],
        "film reviews": [row.text for row in movies],
        "code": lines_of_code(),
        "other languages": messages_in_other_languages(),
    }
    kinds = {}
    for name, all_texts in texts.items():
        chosen = all_texts
        if name != TWEETS:
            chosen = [all_texts[index] for index in generator.permutation(len(all_texts))[:TEXTS]]
        kinds[name] = [tokenize(tokenizer, text) for text in chosen]
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    kinds["random tokens"] = [
        [*generator.choice(ordinary, len(ids) - 1).tolist(), ids[-1]] for ids in kinds[TWEETS][:TEXTS]
    ]
    return kinds


def study(path: str) -> tuple[dict, dict[str, RewardDistribution]]:
    """The figures of a model, and its rewards of each kind of text."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = load_trained(path, dtype="float32")
    kinds = kinds_of_text(tokenizer)
    rewards = {name: score(model, sequences, description=name) for name, sequences in kinds.items()}
    if rewards[TWEETS].location_error is None:
        raise ValueError(f"{path} has no epistemic uncertainty; train it with epistemic=True")
    familiar = rewards[TWEETS]
    figures: dict[str, Any] = {"texts": {name: len(reward) for name, reward in rewards.items()}, "kinds": {}}
    for name, reward in rewards.items():
        of_kind = {what: getattr(reward, what).median().item() for what in ("location_error", "scale")}
        if name != TWEETS:
            label = np.r_[np.zeros(len(familiar)), np.ones(len(reward))]
            for what in ("location_error", "scale"):
                both = np.r_[getattr(familiar, what), getattr(reward, what)]
                of_kind[f"auroc_{what}"] = float(roc_auc_score(label, both))
        figures["kinds"][name] = of_kind
    _, tweets = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))
    pairs = human_ratings.draw_votes(tweets, 30_000, seed=0)
    people = RewardDistribution(familiar.location, familiar.scale, familiar.family, familiar.shape)
    for name, reward in (("with the error", familiar), ("without", people)):
        forecasts = Forecasts.of(reward[pairs[:, 0]], reward[pairs[:, 1]])
        figures[name] = {"nll": negative_log_likelihood(forecasts), "accuracy": accuracy(forecasts)}
    return figures, rewards


def plot(rewards: dict[str, dict[str, RewardDistribution]], path: Path) -> None:
    """Draws the location errors of each kind of text, by model."""
    figure, axes = plt.subplots(
        1, len(rewards), figsize=(1.2 + 3.4 * len(rewards), 3.2), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, kinds) in zip(axes[0], rewards.items(), strict=True):
        axis.boxplot(
            [np.asarray(kind.location_error) for kind in reversed(kinds.values())],
            orientation="horizontal",
            tick_labels=list(reversed(kinds)),
            whis=(5, 95),
            showfliers=False,
            medianprops={"color": "#c4571b"},
        )
        axis.set(title=name, xlabel="location error, in units of reward", xlim=(0, None))
    figure.savefig(path, dpi=160)


def main() -> None:
    """Studies the models of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.unfamiliar_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="Path of a checkpoint, optionally with its name in the table.",
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for figures.json and unfamiliar.png.")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    figures, rewards = {}, {}
    for argument in args.models:
        name, _, path = argument.rpartition("=")
        figures[name or path], rewards[name or path] = study(path)
    (args.output / "figures.json").write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", "utf-8")
    plot(rewards, args.output / "unfamiliar.png")
    print("| model | text | location error, median | AUROC | AUROC of the scale |\n| --- | --- | ---: | ---: | ---: |")
    for name, found in figures.items():
        for kind, of_kind in found["kinds"].items():
            aurocs = [
                f"{of_kind[key]:.3f}" if key in of_kind else "" for key in ("auroc_location_error", "auroc_scale")
            ]
            print(f"| {name} | {kind} | {of_kind['location_error']:.3f} | " + " | ".join(aurocs) + " |")
        for key in ("with the error", "without"):
            print(f"{name}: held-out votes {key}: NLL {found[key]['nll']:.4f}, accuracy {found[key]['accuracy']:.4f}")


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, ValueError) as error:
        sys.exit(str(error))
