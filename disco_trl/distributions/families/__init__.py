"""The families of reward distributions: one module for each, registered by the imports below.

The order here is the order in which help texts, error messages and tables list them. `docs/families.md` derives each
formula and says what location and scale are.
"""

# isort: off
from .base import FAMILIES, Difference, Family, get_family, register_family
from .normal import Normal
from .cauchy import Cauchy
from .logistic import Logistic
from .laplace import Laplace
from .mixture import NormalMixture


__all__ = [
    "FAMILIES",
    "Cauchy",
    "Difference",
    "Family",
    "Laplace",
    "Logistic",
    "Normal",
    "NormalMixture",
    "get_family",
    "register_family",
]
