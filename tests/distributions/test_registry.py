"""The registry of families: one class is a whole family, and whatever lists families lists all of them."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from tiny_training import disco_trainer, preferences

from disco_trl import DiscoRewardConfig, DiscoRewardModel, RewardDistribution
from disco_trl.distributions.families import FAMILIES, Cauchy, Family, Normal, base, get_family, register_family
from disco_trl.distributions.transforms import get_transform
from disco_trl.simulation.population import heteroscedastic


DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.fixture(autouse=True)
def registry():
    """Whatever a test registers is removed again."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_every_family_is_registered_under_its_name():
    assert {name: family.name for name, family in FAMILIES.items()} == {
        name: name for name in ("normal", "cauchy", "logistic", "laplace", "mixture")
    }


def test_an_unknown_family_lists_those_there_are():
    with pytest.raises(ValueError, match=r"'gumbel' is unknown; choose one of 'normal', 'cauchy', 'logistic'"):
        get_family("gumbel")


# Lists


@pytest.mark.parametrize("name", FAMILIES)
def test_lists_name_every_family(name):
    family = FAMILIES[name]
    (option,) = (field for field in fields(DiscoRewardConfig) if field.name == "reward_family")
    assert f"'{name}' ({family.summary})" in option.metadata["help"]
    for documented in (DiscoRewardConfig, DiscoRewardModel.from_pretrained):
        entry = re.search(r"reward_family[:( ].*?\n *fixed_scale", documented.__doc__, flags=re.DOTALL).group()
        assert f'`"{name}"`' in entry
    row = f'| `"{name}"` | {family.formula} | {family.summary} | {family.unit_scale:.3f} |'
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_fit_into_tables_and_sentences(name):
    family = FAMILIES[name]
    assert "|" not in family.formula + family.summary and "\n" not in family.formula + family.summary
    assert not family.summary.endswith(".") and family.reading.endswith(".")
    assert "%" not in family.summary  # argparse reads it as a format


# A new family


@pytest.fixture
def sech():
    """The family that docs/families.md defines, registered as a reader would do it."""
    section = DOCUMENT.read_text(encoding="utf-8").split("## Add a family")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    exec(code, {})
    return get_family("sech")


def test_the_family_of_the_documentation(sech):
    assert list(FAMILIES)[-1] == "sech"
    with pytest.raises(ValueError, match=r"'gumbel' is unknown; .*'mixture', 'sech'"):
        get_family("gumbel")
    assert DiscoRewardConfig("out", reward_family="sech", use_cpu=True, bf16=False).reward_family == "sech"

    # A reward of it can do all that others can. Variance 1: 400,000 draws have a standard deviation of 1 ± 0.007.
    z = torch.linspace(-20, 20, 81, dtype=torch.float64)
    torch.testing.assert_close(sech.quantile(sech.log_cdf(z[:60]).exp()), z[:60])
    reward = RewardDistribution(torch.tensor([1.5, -0.5]), torch.tensor([0.5, 2.0]), "sech")
    assert reward.sample((400_000,), torch.Generator().manual_seed(0)).std(dim=0).tolist() == pytest.approx(
        [0.5, 2.0], rel=0.01
    )
    torch.testing.assert_close(
        reward[[0]].prob_greater(reward[[1]]) + reward[[1]].prob_greater(reward[[0]]), torch.ones(1)
    )
    # -β log E[e^(-R/β)] = μ + β log cos(σ/β), with β = 2
    assert reward.certainty_equivalent(2.0).tolist() == pytest.approx(
        [1.5 + 2 * torch.tensor(0.25).cos().log().item(), -0.5 + 2 * torch.tensor(1.0).cos().log().item()], rel=1e-5
    )
    # Slope ¼ at the unit
    location = torch.zeros((), requires_grad=True)
    unit = torch.tensor(sech.unit_scale)
    (slope,) = torch.autograd.grad(sech.log_prob_greater(location, unit, torch.zeros(()), unit).exp(), location)
    assert slope.item() == pytest.approx(0.25)


def test_a_link_is_no_noise_for_simulated_people(sech):
    with pytest.raises(ValueError, match="'sech' is no distribution of a reward; choose one of 'normal'"):
        heteroscedastic([[0.0], [1.0]], family="sech")


def test_errors_of_a_location_are_averaged_over_without_further_code(sech):
    """With an error far beyond the scales it is the error that decides: Φ(1)."""
    a = RewardDistribution(torch.ones(1), torch.full((1,), 1e-3), "sech", location_error=torch.ones(1))
    b = RewardDistribution(torch.zeros(1), torch.full((1,), 1e-3), sech)
    assert a.prob_greater(b).item() == pytest.approx(0.8413447, abs=1e-5)
    get_transform("certainty_equivalent").check_family("sech")


# Rewards carry their family


def test_a_family_is_given_by_name_or_as_it_is():
    one = torch.ones(1)
    by_name, as_it_is = (RewardDistribution(one, one, family) for family in ("cauchy", get_family("cauchy")))
    for reward in (by_name, as_it_is, as_it_is[:1], RewardDistribution.cat([as_it_is, by_name])):
        assert reward.family == "cauchy" and reward.kind is get_family("cauchy")


def test_a_training_step_looks_no_family_up(tmp_path, tiny_llama_dir, tiny_tokenizer, monkeypatch):
    class Counting(dict):
        lookups = 0

        def __getitem__(self, name):
            Counting.lookups += 1
            return super().__getitem__(name)

    monkeypatch.setattr(base, "FAMILIES", Counting(FAMILIES))
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, processing_class=tiny_tokenizer, train_dataset=preferences(), max_steps=1
    )
    assert Counting.lookups > 0  # when the model is made
    Counting.lookups = 0
    trainer.train()
    assert Counting.lookups == 0


# Refusals


def test_what_is_missing_is_named():
    with pytest.raises(TypeError, match="the family Nameless has no name and no formula and no summary"):

        @register_family
        class Nameless(Family):
            unit_scale = 1.0

    with pytest.raises(TypeError, match="abstract"):

        @register_family
        class Unfinished(Family):
            name, formula, summary, reading, unit_scale = "unfinished", "", "", "", 1.0

    with pytest.raises(ValueError, match="'flat' has unit_scale=0"):

        @register_family
        class Flat(Normal):
            name, unit_scale = "flat", 0.0

    assert "unfinished" not in FAMILIES


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match=r"'cauchy' is the name of .*\.Cauchy already; give Other another name"):

        @register_family
        class Other(Normal):
            name = "cauchy"

    register_family(Cauchy)  # the same class again, as from a notebook cell that is run twice
    assert type(get_family("cauchy")) is Cauchy
