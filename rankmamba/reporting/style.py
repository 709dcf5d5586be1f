"""How systems look in every figure and panel: one colour, marker and line for a family.

Warm colours are state-space models, cool ones Transformers, grey is the first stage.
"""

from typing import NamedTuple


class Look(NamedTuple):
    """How a system is drawn: colour, marker, line style."""

    color: str
    marker: str
    line: str | tuple


# In the order of every table and figure; the longest word found in a system's name decides. Colours after Okabe & Ito and P. Tol.
FAMILIES = {
    ("bm25",): Look("#222222", "D", (0, (1, 1.2))),
    ("minilm",): Look("#56B4E9", "P", (0, (2, 1))),
    ("bert", "electra"): Look("#0072B2", "s", "--"),
    ("t5", "bart"): Look("#999933", "p", (0, (3, 1, 1, 1, 1, 1))),
    ("neox", "pythia", "gpt"): Look("#009E73", "^", "-."),
    ("opt",): Look("#332288", "v", (0, (5, 1, 1, 1))),
    ("smollm", "llama", "qwen"): Look("#117733", "<", (0, (8, 2))),
    ("mamba",): Look("#D55E00", "o", "-"),
    ("mamba2", "mamba-2"): Look("#882255", "h", (0, (4, 1.5))),
    ("hybrid", "zamba", "jamba"): Look("#E69F00", "d", (0, (6, 1.5))),
}
OTHER = Look("#999999", "X", ":")
# matplotlib's settings for every figure.
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.edgecolor": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "lines.linewidth": 2.2,
    "lines.markersize": 8,
    "figure.facecolor": "white",
    "svg.hashsalt": "rankmamba",
    "text.parse_math": False,  # names of systems are no formulas
}


def base(system: str) -> str:
    """The system that was mixed with a first stage: "X" of "X + bm25"; any other system itself."""
    return system.split(" + ")[0]


def mixed(system: str) -> bool:
    """Whether a system is a mixture with a first stage."""
    return " + " in system


def brief(system: str) -> str:
    """The name as a figure has room for it: of a folder's what follows its last part that names a family, "…/bert/checkpoint-500"."""
    folders = base(system).split("/")
    if folders[0]:
        return system
    return "/".join(["…", *folders[_named(folders) :]]) + system[len(base(system)) :]


def look(system: str) -> Look:
    """How a system is drawn, by the family in its name, of a folder's in the last part that has one; the same in every figure."""
    folders = base(system).split("/")
    return _family(folders[_named(folders)])


def _named(folders: list[str]) -> int:
    """The place of the last part of a name that names a family; the last where none does."""
    return next((place for place in reversed(range(len(folders))) if _family(folders[place]) != OTHER), len(folders) - 1)


def _family(name: str) -> Look:
    name = name.lower().replace("rankmamba", "")  # a clone of which is no Mamba
    found = [(len(word), style) for words, style in FAMILIES.items() for word in words if word in name]
    return max(found, key=lambda both: both[0], default=(0, OTHER))[1]


def order(system: str) -> tuple[int, str]:
    """The key that sorts systems everywhere: the first stage, Transformers, state-space models, each beside its mixture."""
    return [*FAMILIES.values(), OTHER].index(look(system)), system
