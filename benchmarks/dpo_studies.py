"""Studies of DPO: policies that read the same judgements in different ways, some of them wrong or contested.

Run as:

    python -m benchmarks.dpo_studies noisy contested --argument_votes FOLDER --dtype bfloat16 --output runs/dpo

- `noisy`: 960 single votes on tweets, a fifth of them turned round.
- `contested`: 960 pairs of arguments (`benchmarks.argument_votes`) with five real votes each, of which most policies
  see one that is no tie.

All policies start from the same model and see the same pairs in the same order, one epoch in batches of 16. At four
points they are asked which of two held-out answers is better, by their implicit rewards β log(π / π_ref), and write 64
texts. The held-out pairs are among 200 texts and the same in all runs. Tweets have the share of votes that their
ratings imply, and arguments the share of five votes, ties counting half. *Clear* pairs are those on which at least
four in five votes agree, and *contested* ones those on which neither side gets more than three in five. What the
policies write is scored by a judge, a reward model that was trained on what people said about the held-out texts.

A soft label is the probability that a reward model gives to the pair. The reward model is
[`disco_trl.DiscoRewardTrainer`]'s, trained on the same 960 votes for `noisy`, and on 2,400 pairs with all their votes
for `contested`. On noisy votes it has a constant scale, so that there is none to be read.

Finished runs are not repeated. The studies end with a table and a chart each. On two cores, with one seed on each at a
time (`--seeds`), neither is meant to take more than 90 minutes.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from trl import DPOTrainer

from disco_trl.data.columns import STRENGTH
from disco_trl.data.files import written_at_once
from disco_trl.evaluation import verdicts

from . import argument_votes, human_ratings
from .dpo_runs import (
    BETA,
    SIDES,
    HeldOutPairs,
    Policy,
    Run,
    answer,
    mean_reward,
    rewards_of,
    train_policy,
    train_reward_model,
)
from .study_runs import SEEDS, study_parser, write_tables


PAIRS = 960
JUDGED = 2400
"""Number of comparisons that a judge, or a reward model of arguments, is trained on."""
BLOCK = (8, 16)
FLIPPED = 0.2
HELD_OUT_TEXTS, HELD_OUT_PAIRS = 200, 1500
PROMPTS = 8
"""Most prompts that a policy is asked to write to."""
PROBABILITY = "preference_probability"

Rows = list[dict[str, Any]]


# Worlds: what people said


def conversation(prompt: str, row: dict[str, Any], **said: Any) -> dict[str, Any]:
    """A pair of texts as answers to a prompt, in messages."""
    return {
        "prompt": [{"role": "user", "content": prompt}],
        **{side: answer(row[side]) for side in SIDES},
        **said,
    }


def judgements_of(row: dict[str, Any]) -> dict[str, Any]:
    """What people said about a pair."""
    return {name: value for name, value in row.items() if name not in ("prompt", "side", *SIDES)}


class Tweets:
    """People's votes on which of two tweets is more positive, a fifth of them turned round."""

    title = "tweets, a fifth of the votes turned round"
    prompt = "Write a tweet."

    def __init__(self, args: argparse.Namespace):
        self.train, self.test = human_ratings.split_by_text(human_ratings.load_ratings("tweets"))

    def rows(self, seed: int) -> Rows:
        """Training pairs."""
        votes = human_ratings.draw_judged_pairs(self.train, PAIRS, "choices", seed + 1, block=BLOCK)
        return [conversation(self.prompt, row) for row in human_ratings.flip_some(votes, FLIPPED, seed + 1)]

    def of_reward_model(self, seed: int) -> Rows:
        """What the reward model is trained on."""
        return self.rows(seed)

    def of_judge(self) -> Rows:
        """What the judge is trained on."""
        graded = human_ratings.draw_judged_pairs(self.test, JUDGED, "grades", 0, block=BLOCK)
        return [conversation(self.prompt, row, **judgements_of(row)) for row in graded]

    def held_out(self) -> HeldOutPairs:
        """Pairs to predict."""
        generator = np.random.default_rng(0)
        among = generator.permutation(len(self.test))[:HELD_OUT_TEXTS]
        pairs = np.stack([generator.choice(among, 2, replace=False) for _ in range(HELD_OUT_PAIRS)])
        share = human_ratings.win_probability(self.test, pairs)
        rows = [
            dict(zip(SIDES, (self.test[first].text, self.test[second].text), strict=True)) for first, second in pairs
        ]
        held_out = [conversation(self.prompt, row) for row in rows]
        return HeldOutPairs(held_out, share, pairs, [held_out[0]["prompt"]])


class Arguments:
    """Five people's votes on which of two arguments is more convincing."""

    title = "arguments, five votes on a pair"

    def __init__(self, args: argparse.Namespace):
        self.train = argument_votes.read_votes(args.argument_votes, "train")
        self.test = argument_votes.read_votes(args.argument_votes, "test")

    @staticmethod
    def _conversation(row: dict[str, Any]) -> dict[str, Any]:
        debate, stance = row["prompt"].split("\n")[:2]
        prompt = f"Debate: {debate}\nPosition: {stance}\nWrite a short argument for this position."
        return conversation(prompt, row, **judgements_of(row))

    def rows(self, seed: int) -> Rows:
        """Training pairs, with all votes."""
        return [self._conversation(row) for row in argument_votes.in_blocks(self.train, PAIRS, seed)]

    def of_reward_model(self, seed: int) -> Rows:
        """What the reward model is trained on."""
        return [self._conversation(row) for row in argument_votes.in_blocks(self.train, JUDGED, seed)]

    def of_judge(self) -> Rows:
        """What the judge is trained on."""
        return [self._conversation(row) for row in argument_votes.in_blocks(self.test, JUDGED, 0)]

    def held_out(self) -> HeldOutPairs:
        """Pairs to predict."""
        generator = np.random.default_rng(0)
        numbers: dict[str, int] = {}
        rows: Rows = []
        for number in generator.permutation(len(self.test)):
            row = self.test[number]
            if len({*numbers, row["chosen"], row["rejected"]}) <= HELD_OUT_TEXTS:
                rows.append(row)
                for side in SIDES:
                    numbers.setdefault(row[side], len(numbers))
        rows = rows[:HELD_OUT_PAIRS]
        share = np.array([np.mean([(1 + vote) / 2 for vote in row[STRENGTH]]) for row in rows])
        groups = np.array([[numbers[row[side]] for side in SIDES] for row in rows])
        held_out = [self._conversation(row) for row in rows]
        prompts = {json.dumps(row["prompt"]): row["prompt"] for row in held_out}
        kept = [{name: row[name] for name in ("prompt", *SIDES)} for row in held_out]
        return HeldOutPairs(kept, share, groups, [*prompts.values()][:PROMPTS])


# Arms: ways to read it


def one_vote(rows: Rows, reward_model: str | None, seed: int) -> Rows:
    """What one person said of each pair, if it was not a tie."""
    generator = np.random.default_rng(seed)
    found = []
    for row in rows:
        kept = {name: row[name] for name in ("prompt", *SIDES)}
        votes = [vote for vote in row.get(STRENGTH, [1]) if vote]
        if votes and generator.choice(votes) < 0:
            kept["chosen"], kept["rejected"] = kept["rejected"], kept["chosen"]
        if votes:
            found.append(kept)
    return found


def every_vote(rows: Rows, reward_model: str | None, seed: int) -> Rows:
    """What everybody said, ties included."""
    return rows


def soft_label(rows: Rows, reward_model: str | None, seed: int) -> Rows:
    """The probability that a reward model gives to the pair."""
    kept = one_vote(rows, reward_model, seed)
    assert reward_model is not None  # as the arm asks for one
    rewards = rewards_of(reward_model, kept)
    chosen, rejected = (rewards[:, side] for side in range(2))
    probability = chosen.prob_greater(rejected).tolist()
    return [{**row, PROBABILITY: value} for row, value in zip(kept, probability, strict=True)]


@dataclass(frozen=True)
class Arm:
    """A way to read the judgements.

    Attributes:
        title (`str`):
            Name in the table.
        policy ([`Policy`]):
            How the policy is trained.
        read (`Callable`, *optional*, defaults to [`one_vote`]):
            Makes the training rows of what people said.
        needs_reward_model (`bool`, *optional*, defaults to `False`):
            Whether a reward model has a part in it.
        reads_scale (`bool`, *optional*, defaults to `False`):
            Whether the policy gets the scales of the reward model.
    """

    title: str
    policy: Policy
    read: Callable[[Rows, str | None, int], Rows] = one_vote
    needs_reward_model: bool = False
    reads_scale: bool = False


PLAIN = "plain"
ARMS = {
    PLAIN: Arm("DPO", Policy()),
    "robust": Arm(
        f"TRL, robust with {FLIPPED}", Policy(DPOTrainer, {"loss_type": ["robust"], "label_smoothing": FLIPPED})
    ),
    "noise": Arm(f"label noise of {FLIPPED}", Policy(options={"label_noise": FLIPPED})),
    "noise-learned": Arm("label noise, learned", Policy(options={"label_noise": None})),
    "votes": Arm("all five votes, ties included", Policy(), every_vote),
    "soft": Arm("soft label of a reward model", Policy(), soft_label, needs_reward_model=True),
    "scale": Arm("scale of a reward model", Policy(), needs_reward_model=True, reads_scale=True),
    "scale-learned": Arm("scale learned with the policy", Policy(options={"scale_training": "detached"})),
}


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        world (`type`):
            What people said.
        arms (`Sequence[str]`):
            Ways to read it.
    """

    world: type[Tweets] | type[Arguments]
    arms: Sequence[str]


STUDIES = {
    "noisy": Study(Tweets, (PLAIN, "robust", "noise", "noise-learned", "soft", "scale-learned")),
    "contested": Study(Arguments, (PLAIN, "noise-learned", "votes", "soft", "scale", "scale-learned")),
}


# Runs


@dataclass(frozen=True)
class Watched:
    """A finished run, and the mean reward of what the policy wrote at each point, by the judge."""

    run: Run
    rewards: list[float]


def run(name: str, args: argparse.Namespace) -> tuple[HeldOutPairs, dict[str, list[Watched]]]:
    """Trains what is not trained yet, and loads it: for each arm a run for each seed."""
    study, folder = STUDIES[name], args.output / name
    world = study.world(args)
    held_out = world.held_out()
    judge = train_reward_model(args.model, world.of_judge(), folder / "judge", args.dtype, seed=0)
    found: dict[str, list[Watched]] = {arm: [] for arm in study.arms}
    for seed in args.seeds or SEEDS:
        rows = world.rows(seed)
        reward_model = folder / f"reward-model-{seed}"
        for key in study.arms:
            arm, policy = ARMS[key], ARMS[key].policy
            if arm.needs_reward_model:
                train_reward_model(args.model, world.of_reward_model(seed), reward_model, args.dtype, seed)
            if arm.reads_scale:
                policy = dataclasses.replace(policy, options={"scale_model": str(reward_model)})
            print(f"{name}: {arm.title}, seed {seed}", flush=True)
            output = folder / f"{key}-{seed}"
            # (Rows are read again for a run that has finished, which takes seconds.)
            read = arm.read(rows, str(reward_model), seed)
            of_run = train_policy(policy, args.model, read, held_out, output, args.dtype, seed)
            found[key].append(Watched(of_run, judged(of_run, judge, output)))
    return held_out, found


def judged(of_run: Run, judge: str, folder: Path) -> list[float]:
    """Mean reward, by the judge, of what the policy wrote at each point. It is computed once a run."""
    path = folder / "judged.json"
    if not path.exists():
        rewards = [mean_reward(judge, point.written) for point in of_run.points]
        with written_at_once(path) as unfinished:
            unfinished.write_text(json.dumps(rewards) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


# Figures


def cross_entropy(of_run: Run, share: np.ndarray) -> np.ndarray:
    """Cross-entropy of each held-out pair with people's shares, of shape `(points, N)`."""
    probability = of_run.probability
    return -(share * np.log(probability) + (1 - share) * np.log1p(-probability))


def right(of_run: Run, share: np.ndarray) -> np.ndarray:
    """Whether the side that people prefer has the larger reward, of shape `(points, N)`; ½ if they are equal."""
    difference = of_run.location[..., 0] - of_run.location[..., 1]
    return (1 + np.sign(difference) * np.sign(share - 0.5)) / 2


def distance(of_run: Run, of_pairs: np.ndarray) -> np.ndarray:
    """Mean |Δ| of some pairs at each point."""
    return np.abs(of_run.location[..., 0] - of_run.location[..., 1])[:, of_pairs].mean(axis=1)


def pull(of_run: Run, of_pairs: np.ndarray) -> float:
    """Mean gradient of the loss at Δ = 0 at the end, in multiples of that of a policy without scales of its own."""
    # It is ½ / √(σ_a² + σ_b²), and the unit of the family is the scale at which the root is 1.
    return float(np.mean(1 / np.linalg.norm(of_run.scale[-1, of_pairs], axis=-1)))


def curves(found: list[Watched], held_out: HeldOutPairs) -> dict[str, np.ndarray]:
    """Figures at each point, of shape `(seeds, points)`."""
    clear = held_out.is_clear
    return {
        "KL": np.array([[point.kl for point in one.run.points] for one in found]),
        "accuracy": np.array([right(one.run, held_out.share)[:, clear].mean(axis=1) for one in found]),
        "cross-entropy": np.array([cross_entropy(one.run, held_out.share).mean(axis=1) for one in found]),
        "reward": np.array([one.rewards for one in found]),
    }


def kl_at(accuracy: float, of_arm: dict[str, np.ndarray]) -> float:
    """KL divergence at which the mean over seeds first reaches an accuracy, on the line through the points; `nan` if
    it does not. At the start both are at no divergence and an accuracy of one half.
    """
    reached = np.concatenate([[0.5], of_arm["accuracy"].mean(axis=0)])
    divergence = np.concatenate([[0.0], of_arm["KL"].mean(axis=0)])
    for last in range(1, len(reached)):
        if reached[last] >= accuracy:
            share = (accuracy - reached[last - 1]) / (reached[last] - reached[last - 1])
            return float(divergence[last - 1] + share * (divergence[last] - divergence[last - 1]))
    return float("nan")


def table(name: str, args: argparse.Namespace) -> str:
    """Runs a study, draws its chart, and returns its table: figures at the end as means over seeds with their range,
    and paired differences from DPO with 95 % intervals over texts and seeds.
    """
    held_out, found = run(name, args)
    of_arms = {key: curves(runs, held_out) for key, runs in found.items()}
    plot(STUDIES[name].world.title, of_arms, args.output / f"{name}.png")
    # What all arms reach.
    accuracy = min(of_arm["accuracy"].mean(axis=0).max() for of_arm in of_arms.values())
    heads = ["", "accuracy, clear pairs", "cross-entropy", "KL", f"KL at accuracy {accuracy:.3f}", "judge's reward"]
    heads += ["&#124;Δ&#124;, contested", "clear", "pull, contested", "clear"]
    heads += ["accuracy less that of DPO", "cross-entropy less that of DPO"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for key, runs in found.items():
        of_arm = of_arms[key]
        cells = [spread(of_arm["accuracy"][:, -1]), spread(of_arm["cross-entropy"][:, -1])]
        cells += [spread(of_arm["KL"][:, -1], "{:.2f}"), f"{kl_at(accuracy, of_arm):.2f}"]
        cells += [spread(of_arm["reward"][:, -1], "{:.2f}")]
        kinds = (held_out.is_contested, held_out.is_clear)
        cells += [f"{np.mean([distance(one.run, kind)[-1] for one in runs]):.2f}" for kind in kinds]
        cells += [f"{np.mean([pull(one.run, kind) for one in runs]):.2f}" for kind in kinds]
        cells += differences(runs, found[PLAIN], held_out) if key != PLAIN else ["–", "–"]
        lines.append(f"| {ARMS[key].title} | " + " | ".join(cells) + " |")
    clear, contested = held_out.is_clear.sum(), held_out.is_contested.sum()
    note = f"{len(held_out.share):,} held-out pairs, {clear:,} of them clear and {contested:,} contested; β = {BETA}."
    return "\n".join([*lines, "", note])


def spread(values: np.ndarray, form: str = "{:.3f}") -> str:
    """Mean over seeds, with the range."""
    return verdicts.mean_and_range(values.tolist(), form)


def differences(ours: list[Watched], theirs: list[Watched], held_out: HeldOutPairs) -> list[str]:
    """Paired differences at the end, in the accuracy on clear pairs and in the cross-entropy on all."""
    cells = []
    for of_pairs, weight, lower_is_better in (
        (right, held_out.is_clear.astype(float), False),
        (cross_entropy, np.ones(len(held_out.share)), True),
    ):
        first, second = (np.stack([of_pairs(one.run, held_out.share)[-1] for one in runs]) for runs in (ours, theirs))
        cells.append(str(verdicts.verdict_on(first, second, weight, held_out.groups, lower_is_better)))
    return cells


def plot(title: str, of_arms: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draws what the policies predict, and what a judge says of what they write, against how far they have moved."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels = {
        "accuracy": "accuracy on clear held-out pairs",
        "cross-entropy": "cross-entropy with people's shares",
        "reward": "judge's reward of what the policy writes",
    }
    colors = plt.colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a listed colormap
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for color, (key, of_arm) in zip(colors, of_arms.items(), strict=False):
            means = [of_arm[of].mean(axis=0) for of in ("KL", name)]
            axis.plot(*means, "o-", color=color, markersize=4, label=ARMS[key].title, linewidth=1.5)
        axis.set(title=label, xlabel="KL from the model at the start (nats a text)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Runs the studies of the command line."""
    parser = study_parser("python -m benchmarks.dpo_studies", __doc__, STUDIES, seeds="0 1 2")
    parser.add_argument(
        "--argument_votes", type=Path, metavar="FOLDER", help="Folder of the votes on arguments, for `contested`."
    )
    args = parser.parse_args(argv)
    if "contested" in args.studies and args.argument_votes is None:
        parser.error("the study `contested` needs --argument_votes FOLDER; see benchmarks/argument_votes.py")
    write_tables(args, {name: functools.partial(table, name) for name in STUDIES})


if __name__ == "__main__":
    try:
        main()
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
