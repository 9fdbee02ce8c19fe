"""The report: what is in the page, whether it is self-contained and readable, and how a browser takes it."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from disco_trl.distributions.reward_distribution import RewardDistribution
from disco_trl.evaluation.evaluate import as_json, evaluate
from disco_trl.evaluation.held_out import HeldOut
from disco_trl.evaluation.report import TEMPLATE, Model, Verdict, pick_examples, write_report
from disco_trl.evaluation.scored import Scored


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = "<script>alert('bad')</script><img src=x onerror=alert(1)> & a very" + "long" * 300


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def held_out(tiny_tokenizer) -> HeldOut:
    rows = [
        {"chosen": conversation("Which?", f"this {i}"), "rejected": conversation("Which?", f"that {i} {HOSTILE}")}
        for i in range(24)
    ]
    return HeldOut.read(rows, tiny_tokenizer)


def rewards_of(held_out: HeldOut, margins: np.ndarray) -> RewardDistribution:
    """Rewards that give the comparisons these margins."""
    location = np.zeros(len(held_out.sequences))
    location[held_out.first] = margins
    return RewardDistribution(torch.from_numpy(location), torch.full((len(location),), 0.5).double(), "normal")


MARGINS = np.r_[2.5, -1.9, 0.01, np.linspace(0.2, 1.5, 19), -0.3, 2.9]


@pytest.fixture
def page(held_out, tmp_path) -> str:
    models = []
    for name, margins in (("ours", MARGINS), ("theirs <b>", MARGINS / 2)):
        figures = as_json(evaluate(Scored(rewards_of(held_out, margins)), held_out, draws=20))
        models.append(Model(name, figures, [(0.0, 0.7), (1.0, 0.5)], {"minutes": "3"}))
    rewards = rewards_of(held_out, MARGINS)
    verdicts = {
        "ours": {"nll": Verdict("better", -0.2, -0.3, -0.1, 1), "accuracy": Verdict("undecided", 0, -0.1, 0.1, 1)}
    }
    path = write_report(tmp_path, "Title & more", models, rewards, held_out, verdicts, {"Data": "some"})
    return path.read_text()


def test_says_what_was_found(page, tmp_path, held_out):
    figures = evaluate(Scored(rewards_of(held_out, MARGINS)), held_out, draws=20)
    assert str(round(figures.metrics["nll"].value, 4)) in page
    assert (
        "<title>Title &amp; more</title>" in page
        and "better<span" in page
        and "−0.2000 (−0.3000 to −0.1000)" in page
        and "theirs &lt;b&gt;" in page
        and "their intervals do not include the randomness of training." in page
    )
    assert "24 held-out comparisons of 48 answers" in page and "the first was preferred" in page
    for name in ("reliability", "risk-coverage", "learning"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("informs", [False, True])
def test_scales_beside_raters(informs, tiny_tokenizer, tmp_path):
    """What a varying scale says about people's ratings is drawn and said; of a constant one, that it says nothing."""
    generator = np.random.default_rng(0)
    spread = np.exp(generator.normal(scale=0.5, size=60))
    rows = []
    for i in range(0, 60, 2):
        ratings = [(spread[j] * generator.normal(size=6)).tolist() for j in (i, i + 1)]
        rows.append(
            {"chosen": f"{i}", "rejected": f"{i + 1}", "chosen_rating": ratings[0], "rejected_rating": ratings[1]}
        )
    held_out = HeldOut.read(rows, tiny_tokenizer)
    scale = torch.from_numpy(spread if informs else np.ones(60))
    rewards = RewardDistribution(torch.from_numpy(generator.normal(size=60)), scale, "normal")
    found = as_json(evaluate(Scored(rewards), held_out, draws=20))
    page = write_report(tmp_path, "Ratings", [Model("ours", found)], rewards, held_out).read_text()
    assert (tmp_path / "spread.png").exists() == informs == ("in ten groups of answers" in page)
    words = "ours: the rank correlation of the scale with the spread of people’s ratings is 0."
    assert (words in page) == informs
    assert ("ours: the scale is the same for every answer" in page) != informs
    assert ("none: the scale is constant" in page) != informs and "People’s ratings (rank correlation)" in page


def test_names_are_no_mathematics(held_out, tmp_path):
    rewards = rewards_of(held_out, MARGINS)
    figures = as_json(evaluate(Scored(rewards), held_out, draws=20))
    name = r"cost $\frac$ {1} %s"
    page = write_report(tmp_path, name, [Model(name, figures, [(0.0, 0.7)])], rewards, held_out).read_text()
    assert page.count(name) > 5 and f">{name}</text>" in page


def test_is_self_contained_and_runs_nothing(page):
    assert not re.search(r"<script|<link|<iframe|<img|\son\w+=\"|@import|url\((?!#)", page)
    assert "&lt;script&gt;alert(" in page
    targets = re.findall(r"(?:href|src)=\"([^\"]*)\"", page)
    assert targets and all(target.startswith("#") for target in targets)
    # Each picture's parts have names of their own.
    ids = re.findall(r"\sid=\"([^\"]*)\"", page)
    assert len(ids) == len(set(ids))


def test_examples_are_the_surest_the_most_torn_and_the_wrong(held_out):
    examples = pick_examples(rewards_of(held_out, MARGINS), held_out)
    assert [example.kind for example in examples] == [
        kind
        for kind in ("Most confident, and right", "Least confident", "Most confident, and wrong")
        for _ in range(2)
    ]
    assert [example.answers[0] for example in examples] == [f"this {i}" for i in (23, 0, 2, 3, 1, 22)]
    assert examples[0].prompt == "user: Which?" and len(examples[0].answers[1]) < 700
    assert [len(pick_examples(rewards_of(held_out, MARGINS), held_out, each)) for each in (1, 0)] == [3, 0]


def palettes() -> dict[str, dict[str, str]]:
    """The colours of the light, the dark and the printed page; each lists what it changes of the first."""
    found = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)
    light, dark, paper = (dict(re.findall(r"--([\w-]+): (#\w+);", block)) for block in found)
    return {"light": light, "dark": light | dark, "print": light | paper}


def luminance(color: str) -> float:
    """Relative luminance of sRGB (WCAG 2.2)."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    channels = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("mode", ["light", "dark", "print"])
def test_contrast(mode):
    """Text at 4.5 : 1 and lines that carry meaning at 3 : 1, the levels AA of WCAG 2.2."""
    colors = palettes()[mode]
    for ground in ("paper", "panel"):
        for name, color in colors.items():
            brighter, darker = sorted((luminance(color), luminance(colors[ground])), reverse=True)
            ratio = (brighter + 0.05) / (darker + 0.05)
            if name in ("ink", "soft"):
                assert ratio >= 4.5, (name, ground)
            elif name.startswith("series") or name == "faint":
                assert ratio >= 3, (name, ground)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser(page, tmp_path):
    """On a phone it fits, nothing is complained of, and everything that should be drawn is."""
    framed = tmp_path / "framed.html"
    framed.write_text(
        f'<iframe id="phone" width="390" height="800" srcdoc="{html.escape(page)}"></iframe><script>'
        'document.getElementById("phone").onload = (event) => { const inside = event.target.contentDocument;'
        "document.title = JSON.stringify({width: inside.documentElement.scrollWidth, "
        'charts: [...inside.querySelectorAll("svg.chart")].filter((svg) => svg.getBoundingClientRect().width > 250)'
        '.length, tables: inside.querySelectorAll("table").length,'
        "ink: getComputedStyle(inside.body).color}) }</script>"
    )
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000"]
    command += ["--dump-dom", framed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    assert found.pop("width") <= 390
    assert found == {"charts": 9, "tables": 2, "ink": "rgb(29, 36, 48)"}
    assert ":CONSOLE" not in done.stderr
