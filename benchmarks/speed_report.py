"""Tables in Markdown and charts of `benchmarks.speed`, made from its results."""

import statistics
from pathlib import Path
from typing import Any


# From the palette of Okabe and Ito, which colour-blind readers can tell apart.
DISCO, TRL = "#0072B2", "#D55E00"
UNIQUE, REPEATED, PADDING = "#009E73", "#F0E442", "#BBBBBB"


def spread(values: list[float], number: str = "{:.2f}") -> str:
    """Median, with the range if there are several values."""
    text = number.format(statistics.median(values))
    return text if len(values) == 1 else f"{text} ({number.format(min(values))} to {number.format(max(values))})"


def markdown(rows: list[dict[str, str]]) -> str:
    """Markdown table of rows with the same columns. The first column is aligned left, the others right."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])


# Tables


def train_table(result: dict[str, Any]) -> str:
    """Table of `train`: one row for each variant, with notes on the columns."""
    settings = result["settings"]
    rows = []
    has_utilisation = settings["peak_flops"] is not None
    for variant in result["variants"].values():
        difference = variant["loss_difference"]
        row = {
            "": variant["label"],
            "pairs/s": f"{statistics.median(variant['pairs_per_second']):.2f}",
            "times TRL": spread(variant["times_trl"]),
            "unique tokens/s": f"{variant['unique_tokens_per_second']:,.0f}",
            "processed/unique": f"{variant['processed_per_unique_in_epoch']:.2f}",
            "... in the timed steps": f"{variant['processed_per_unique']:.2f}",
            "peak memory, GiB": f"{variant['peak_bytes'] / 2**30:.2f}",
            "loss − TRL's, at most": "" if difference is None else f"{difference:.4f}",
        }
        if has_utilisation:
            row["MFU"] = f"{variant['utilisation']:.1%}"
        rows.append(row)
    notes = [
        f"Batches of {settings['batch_size']} pairs, "
        f"{'LoRA of rank 16' if settings['lora'] else 'all weights trained'}, {settings['dtype']}, gradient "
        f"checkpointing {'on' if settings['gradient_checkpointing'] else 'off'}. {settings['steps']} batches that "
        f"stand for an epoch of {result['pairs']:,} pairs, {settings['rounds']} times over, a step of each variant "
        "in turn, after once through all of them to warm up. In brackets: the range over the rounds.",
        "Unique: every pair's prompt counted once, no padding. Processed: what goes through the layers, padding and "
        "all, in a whole epoch. Memory: from before the model is loaded to the end of two steps on the epoch's batch "
        "that is the largest when padded. The rows with a loss difference were trained on TRL's batches with TRL's "
        "loss (the logistic family at a fixed scale); *disco, defaults* has TRL's batches and a learned scale, which "
        "is another loss. TRL groups preferences by length if the dataset is given a column `length` (here the longer "
        "side's) and `remove_unused_columns=False` keeps it.",
    ]
    if has_utilisation:
        notes.append(
            f"MFU: useful floating-point operations of {settings['peak_flops'] / 1e12:,.0f} TFLOP/s. Useful are, for "
            "each unique token, 6 for each weight that is trained and 4 for one that is not (its gradient is not "
            "computed, that of the activations is), and attention's 12 × layers × width × keys seen. What padding, "
            "repeated prompts or activation checkpointing compute again does not count."
        )
    return "\n\n".join([markdown(rows), *notes])


def sweep_table(result: dict[str, Any]) -> str:
    """Table of `train --sweep`: one row for each point."""
    rows = []
    for point in result["points"]:
        trl, disco = point["variants"]["trl"], point["variants"]["default"]
        rows.append(
            {
                "varied": f"{point['axis']} {point['value']}",
                "TRL, pairs/s": f"{statistics.median(trl['pairs_per_second']):.2f}",
                "disco, pairs/s": f"{statistics.median(disco['pairs_per_second']):.2f}",
                "times TRL": spread(disco["times_trl"]),
                "TRL, processed/unique": f"{trl['processed_per_unique']:.2f}",
                "disco, processed/unique": f"{disco['processed_per_unique']:.2f}",
            }
        )
    middle = ", ".join(f"{axis} {value}" for axis, value in result["middle"].items())
    return (
        f"{markdown(rows)}\n\nBoth at their defaults, on the same batches of random tokens. The sides of a pair are "
        "equally long, and those of a batch between a half and one and a half of the length given, evenly apart. What "
        f"is not varied: {middle}."
    )


def score_table(result: dict[str, Any]) -> str:
    """Table of `score`: one row for each number of answers and length of prompts."""
    rows = []
    for point in result["points"]:
        rate, processed = point["texts_per_second"], point["processed_per_unique"]
        rows.append(
            {
                "K": str(point["answers"]),
                "prompt, tokens": f"{point['prompt_tokens']:.0f}",
                "answer, tokens": f"{point['answer_tokens']:.0f}",
                "TRL, texts/s": f"{statistics.median(rate['trl']):.1f}",
                "disco, texts/s": f"{statistics.median(rate['disco']):.1f}",
                "times TRL": spread(point["times_trl"]),
                "TRL, processed/unique": f"{processed['trl']:.2f}",
                "disco, processed/unique": f"{processed['disco']:.2f}",
                "largest difference of a reward": f"{point['largest_difference']:.2g}",
            }
        )
    settings = result["settings"]
    return (
        f"{markdown(rows)}\n\n`GRPOTrainer._calculate_rewards` with a stock classifier in `reward_funcs`, and with "
        f"`DiscoReward`, call by call in turn: {settings['prompts']} prompts with K answers each in a call. "
        f"Calls in a round: {settings['calls']}; rounds: {settings['rounds']}, after one to warm up; "
        f"{settings['dtype']}. Rewards have a standard deviation of {result['points'][0]['reward_deviation']:.2g}."
    )


def prepare_table(result: dict[str, Any]) -> str:
    """Table of `prepare`: one row for each size."""
    rows = []
    for point in result["points"]:
        rate, peak = point["pairs_per_second"], point["peak_bytes"]
        rows.append(
            {
                "pairs": f"{point['pairs']:,}",
                "TRL, pairs/s": f"{statistics.median(rate['trl']):,.0f}",
                "disco, pairs/s": f"{statistics.median(rate['default']):,.0f}",
                "times TRL": spread(point["times_trl"]),
                "TRL, peak MiB": f"{peak['trl'] / 2**20:,.0f}",
                "disco, peak MiB": f"{peak['default'] / 2**20:,.0f}",
                "kept by TRL": f"{point['kept']['trl']:,}",
                "kept by disco": f"{point['kept']['default']:,}",
            }
        )
    return (
        f"{markdown(rows)}\n\nThe trainers' `_prepare_dataset` on rows on disk, each run in a process of its own, in "
        "turn. Memory: above what the process held before, without pages of memory-mapped files. Ours checks rows, "
        "numbers them, and drops pairs whose sides are equal."
    )


def head_table(result: dict[str, Any]) -> str:
    """Table of `head`: the cost of head and loss relative to the model."""
    seconds, settings = result["seconds"], result["settings"]
    labels = {"plain": "linear head, Bradley–Terry", "disco": "disco head and loss, normal", "model": "model"}
    rows = [{"forward and backward": label, "ms": f"{1000 * seconds[name]:.3f}"} for name, label in labels.items()]
    of_posterior = seconds["posterior"] * (settings["pairs"] // settings["batch_size"])
    return (
        f"{markdown(rows)}\n\n{settings['batch_size']} pairs, {result['tokens']:,} tokens. What the distribution adds "
        f"is {spread(result['overhead'], '{:.2%}')} of the model's forward and backward. `epistemic=True` fits a "
        f"posterior after an epoch of {settings['pairs']:,} pairs: {of_posterior:.1f} s, "
        f"{spread(result['posterior'], '{:.3%}')} of the epoch."
    )


def dpo_table(result: dict[str, Any]) -> str:
    """Table of `dpo`: one row for each variant, with notes on the columns."""
    settings, variants = result["settings"], result["variants"]
    rows = []
    for variant in variants.values():
        difference = variant["loss_difference"]
        rows.append(
            {
                "": variant["label"],
                "pairs/s": spread(variant["pairs_per_second"]),
                "times TRL": spread(variant["times_trl"]),
                "processed/unique": f"{variant['processed_per_unique']:.2f}",
                "memory, GiB": f"{variant['peak_bytes'] / 2**30:.2f}",
                "of TRL's": f"{variant['peak_bytes'] / variants['trl']['peak_bytes']:.2f}",
                "loss − TRL's, at most": "" if difference is None else f"{difference:.4f}",
            }
        )
    weights = "LoRA of rank 16" if settings["lora"] else "all weights trained"
    checkpointing = "on" if settings["gradient_checkpointing"] else "off"
    notes = (
        f"Batches of {settings['batch_size']} pairs, {weights}, {settings['dtype']}, gradient checkpointing "
        f"{checkpointing}. {settings['steps']} batches that stand for an epoch of {result['pairs']:,} pairs, "
        f"{settings['rounds']} times over, a step of each variant in turn, after once through all of them to warm up. "
        "In brackets: the range over the rounds. Unique: each prompt counted once, no padding. Memory: the peak "
        "of two steps on the largest batch, above the models at rest and without the state of the optimizer. A "
        "reference that is precomputed is so before the steps that are timed."
    )
    return f"{markdown(rows)}\n\n{notes}"


TABLES = {
    "train": train_table,
    "sweep": sweep_table,
    "dpo": dpo_table,
    "dpo-sweep": sweep_table,
    "score": score_table,
    "prepare": prepare_table,
    "head": head_table,
}


# Pictures


def plot(kind: str, result: dict[str, Any], path: Path) -> None:
    """Draws the chart of a result."""
    import matplotlib

    matplotlib.use("Agg")  # draws without a screen
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    with plt.rc_context(style):
        figure = PICTURES[kind](plt, result)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _train_picture(plt: Any, result: dict[str, Any]) -> Any:
    """How many times faster than TRL each variant is, and beside it why."""
    variants = list(result["variants"].values())[::-1]  # Bars are drawn from the bottom; the first goes to the top.
    labels = [variant["label"] for variant in variants]
    colours = [TRL if label.startswith("TRL") else DISCO for label in labels]
    figure, (speed, work) = plt.subplots(
        1, 2, figsize=(13, 1.6 + 0.55 * len(variants)), sharey=True, layout="constrained"
    )
    times = [statistics.median(variant["times_trl"]) for variant in variants]
    farthest = [max(variant["times_trl"]) for variant in variants]
    ranges = [
        [median - min(variant["times_trl"]) for median, variant in zip(times, variants, strict=True)],
        [top - median for top, median in zip(farthest, times, strict=True)],
    ]
    speed.barh(labels, times, color=colours, xerr=ranges, error_kw={"ecolor": "0.25", "capsize": 3}, height=0.65)
    for row, (variant, top) in enumerate(zip(variants, farthest, strict=True)):
        rate = statistics.median(variant["pairs_per_second"])
        speed.text(top + 0.02 * max(farthest), row, f" {times[row]:.2f} ×   {rate:.2f} pairs/s", va="center")
    speed.set_xlim(0, 1.55 * max(farthest))
    speed.axvline(1, color="0.6", linewidth=1, linestyle="--", zorder=0)
    speed.set_xlabel("training speed, in multiples of TRL's defaults (whiskers: range over rounds)")
    speed.set_title("How many times faster")

    left = [0.0] * len(variants)
    processed = [variant["processed_per_unique_in_epoch"] for variant in variants]
    repeated = [variant["repeated_per_unique_in_epoch"] for variant in variants]
    unique = [min(total, 1.0) for total in processed]
    padding = [max(total - 1 - again, 0.0) for total, again in zip(processed, repeated, strict=True)]
    for label, parts, colour in (
        ("unique", unique, UNIQUE),
        ("the prompt again", repeated, REPEATED),
        ("padding", padding, PADDING),
    ):
        work.barh(labels, parts, left=left, color=colour, label=label, height=0.65)
        left = [start + part for start, part in zip(left, parts, strict=True)]
    for row, total in enumerate(processed):
        work.text(total + 0.02 * max(processed), row, f"{total:.2f}", va="center")
    work.set_xlim(0, 1.12 * max(processed))
    work.set_xlabel("tokens computed for each unique token")
    work.set_title("Why")
    figure.legend(
        *work.get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False, handlelength=1.2
    )
    return figure


def _dpo_picture(plt: Any, result: dict[str, Any]) -> Any:
    """How many times faster than TRL each variant is, what it computes, and what it takes."""
    variants = list(result["variants"].values())[::-1]
    labels = [variant["label"] for variant in variants]
    colours = [TRL if label.startswith("TRL") else DISCO for label in labels]
    figure, panels = plt.subplots(1, 3, figsize=(13, 1.6 + 0.5 * len(variants)), sharey=True, layout="constrained")
    figures = {
        "training speed, in multiples of TRL's defaults": [statistics.median(v["times_trl"]) for v in variants],
        "tokens computed for each unique token": [v["processed_per_unique"] for v in variants],
        "peak memory above the models at rest, GiB": [v["peak_bytes"] / 2**30 for v in variants],
    }
    for panel, (title, values) in zip(panels, figures.items(), strict=True):
        panel.barh(labels, values, color=colours, height=0.65)
        for row, value in enumerate(values):
            panel.text(value + 0.02 * max(values), row, f"{value:.2f}", va="center")
        panel.set_xlim(0, 1.2 * max(values))
        panel.set_xlabel(title)
    return figure


def _sweep_picture(plt: Any, result: dict[str, Any]) -> Any:
    axes_names = list(result["middle"])
    figure, panels = plt.subplots(1, len(axes_names), figsize=(13, 4.4), sharey=True, layout="constrained")
    for name, panel in zip(axes_names, panels, strict=True):
        points = [point for point in result["points"] if point["axis"] == name]
        disco = [point["variants"]["default"] for point in points]
        values = [point["value"] for point in points]
        _times_line(panel, values, [variant["times_trl"] for variant in disco])
        limit = [
            point["variants"]["trl"]["processed_per_unique"] / variant["processed_per_unique"]
            for point, variant in zip(points, disco, strict=True)
        ]
        panel.plot(values, limit, color="0.5", linestyle=":", marker=".", label="fewer tokens alone")
        if name != "prompt share":
            panel.set_xscale("log", base=2)
            panel.set_xticks(values, [str(value) for value in values])
        panel.set_xlabel(
            {"prompt share": "share of the prompt in a side", "length": "mean tokens in a side"}.get(
                name, "pairs in a batch"
            )
        )
    panels[0].set_ylabel("training speed, in multiples of TRL's defaults")
    panels[0].set_ylim(bottom=0)
    panels[-1].legend(frameon=False, loc="lower right")
    return figure


def _score_picture(plt: Any, result: dict[str, Any]) -> Any:
    figure, (rates, times) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    shortest = result["points"][0]["prompt_tokens"]
    points = [point for point in result["points"] if abs(point["prompt_tokens"] / shortest - 1) < 0.2]
    answers = [point["answers"] for point in points]
    for name, colour, marker in (("trl", TRL, "s"), ("disco", DISCO, "o")):
        values = [point["texts_per_second"][name] for point in points]
        _line(rates, answers, values, colour, marker, {"trl": "TRL's GRPO path", "disco": "DiscoReward"}[name])
    _times_line(times, answers, [point["times_trl"] for point in points])
    limit = [point["processed_per_unique"]["trl"] / point["processed_per_unique"]["disco"] for point in points]
    times.plot(answers, limit, color="0.5", linestyle=":", marker=".", label="fewer tokens alone")
    for panel in (rates, times):
        panel.set_xscale("log", base=2)
        panel.set_xticks(answers, [str(number) for number in answers])
        panel.set_xlabel("answers to a prompt (K)")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, loc="best")
    rates.set_ylabel("texts scored per second")
    times.set_ylabel("in multiples of TRL's path")
    prompt, answer = (statistics.mean(point[key] for point in points) for key in ("prompt_tokens", "answer_tokens"))
    rates.set_title(f"Prompts of {prompt:.0f} tokens, answers of {answer:.0f}")
    return figure


def _prepare_picture(plt: Any, result: dict[str, Any]) -> Any:
    figure, (rates, memory) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    sizes = [point["pairs"] for point in result["points"]]
    for name, colour, marker, label in (("trl", TRL, "s", "TRL"), ("default", DISCO, "o", "disco")):
        _line(rates, sizes, [point["pairs_per_second"][name] for point in result["points"]], colour, marker, label)
        peaks = [[point["peak_bytes"][name] / 2**20] for point in result["points"]]
        _line(memory, sizes, peaks, colour, marker, label)
    for panel in (rates, memory):
        panel.set_xscale("log")
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel("pairs in the dataset")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, loc="best")
    rates.set_ylabel("pairs prepared per second")
    memory.set_ylabel("peak memory, MiB")
    return figure


def _line(panel: Any, places: list[Any], values: list[list[float]], colour: str, marker: str, label: str) -> None:
    """Medians, with their ranges as error bars."""
    medians = [statistics.median(own) for own in values]
    ranges = [
        [median - min(own) for median, own in zip(medians, values, strict=True)],
        [max(own) - median for median, own in zip(medians, values, strict=True)],
    ]
    panel.errorbar(places, medians, yerr=ranges, color=colour, marker=marker, capsize=3, label=label)


def _times_line(panel: Any, places: list[Any], times: list[list[float]]) -> None:
    _line(panel, places, times, DISCO, "o", "measured")
    panel.axhline(1, color=TRL, linewidth=1, linestyle="--", label="TRL")


PICTURES = {
    "train": _train_picture,
    "sweep": _sweep_picture,
    "dpo": _dpo_picture,
    "dpo-sweep": _sweep_picture,
    "score": _score_picture,
    "prepare": _prepare_picture,
}
