import itertools
import math
import os

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from rankmamba import plots
from rankmamba.errors import InputError
from rankmamba.evaluate import summarise
from rankmamba.profiling import plots as profile_plots
from rankmamba.reporting.style import FAMILIES, OTHER, brief, look, order

STUDY = ["bm25", "minilm-l6", "nano-bert", "nano-neox", "nano-mamba", "nano-mamba2"]


def values(seed: int) -> pd.DataFrame:
    reciprocal = 1 / np.random.default_rng(seed).geometric(0.3, 30)
    return pd.DataFrame({"RR@100": reciprocal, "nDCG@10": reciprocal**0.5}, index=[f"q{number}" for number in range(30)])


VALUES = {
    **{system: values(seed) for seed, system in enumerate(STUDY)},
    "nano-mamba + bm25": [values(7), values(8), values(9)],
}
ROWS = ["bm25", "minilm-l6", "nano-bert", "nano-neox", "nano-mamba", "nano-mamba2"]
FINAL = pd.DataFrame(
    {
        "system": list(VALUES),
        "RR@100": 0.3,
        "RR@100 low": 0.25,
        "RR@100 high": 0.35,
        "pairs_per_s": [math.nan, 40, 150, 160, 170, 170, 170],
        "minutes": [math.nan, 4, 2, 2, 3, 3, 3],
    }
)
STEPS = pd.DataFrame({"step": range(1, 101), "tokens": np.arange(1, 101) * 6000, "loss": np.linspace(2.1, 0.9, 100)})
WEIGHTS = pd.DataFrame({"weight": [0.0, 0.5, 1.0], "value": [0.4, 0.5, 0.3]})
POSITIONS = pd.DataFrame(
    [
        (start, 20, reading, system, mean, mean - 0.1, mean + 0.1)
        for start, mean in (("0 to 127", 0.8), ("128 to 255", 0.7), ("1024 and more", 0.4))
        for reading, system in (
            ("", "bm25"),
            ("512 tokens", "nano-mamba"),
            ("512 tokens", "nano-bert"),
            ("1024 tokens", "nano-mamba"),
        )
    ],
    columns=["words before the answer", "queries", "reading", "system", "mean", "low", "high"],
)
LENGTHS = pd.DataFrame(
    [
        (f"rankmamba/{name}/test", system, tokens, 0.5, 0.4, 0.6)
        for name in ("squad", "squad-long/600")
        for system, tokens in (("bm25", math.nan), ("nano-mamba", 512), ("nano-mamba", 1024), ("nano-bert", 512))
    ],
    columns=["collection", "system", "tokens", "mean", "low", "high"],
)
WORDS = pd.DataFrame(
    [
        (words, 10, system, difference, difference - 0.1, difference + 0.1, 0.5)
        for words, difference in (("5 to 48", 0.1), ("49 to 81", 0.0), ("82 to 500", -0.1))
        for system in ("nano-mamba", "nano-bert")
    ],
    columns=["words", "queries", "system", "difference", "low", "high", "of the baseline"],
)
FIGURES = {
    "forest": lambda: plots.forest(VALUES, ["RR@100", "nDCG@10"]),
    "cost": lambda: plots.cost(FINAL),
    "cost of bm25 alone": lambda: plots.cost(FINAL[:1]),
    "training curves": lambda: plots.training_curves({"nano-mamba": STEPS, "nano-bert": [STEPS, STEPS[:90]]}, 8),
    "wins and losses": lambda: plots.wins_and_losses(VALUES),
    "document lengths": lambda: plots.document_lengths(range(5, 400), 128),
    "answer positions": lambda: plots.answer_positions(POSITIONS),
    "differences by words": lambda: plots.differences_by_words(WORDS),
    "reading lengths": lambda: plots.reading_lengths(LENGTHS),
    "weight curves": lambda: plots.weight_curves({"nano-mamba": WEIGHTS}),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_every_figure_has_named_axes_shows_itself_and_leaves_no_state(draw):
    before = dict(matplotlib.rcParams)
    figure = draw()
    picture, size = figure._repr_png_()
    assert isinstance(figure, Figure) and picture.startswith(b"\x89PNG") and size["width"] > 300
    assert size["alt"].endswith((".", ":")) and "`" not in size["alt"]
    assert matplotlib.pyplot.get_fignums() == [] and dict(matplotlib.rcParams) == before
    xlabel, ylabel = figure.get_supxlabel(), figure.get_supylabel()
    for axes in figure.axes:
        assert axes.get_xlabel() or xlabel
        assert axes.get_ylabel() or ylabel or [label.get_text() for label in figure.axes[0].get_yticklabels()] == ROWS


def test_a_saved_figure_is_png_and_svg_and_the_same_every_time(tmp_path):
    paths = [plots.save(FIGURES["forest"](), tmp_path / folder, "effectiveness") for folder in ("a", "b")]
    assert [path.name for path in paths] == ["effectiveness.png"] * 2
    for kind in (".png", ".svg"):
        first, second = (path.with_suffix(kind).read_bytes() for path in paths)
        assert first == second and (b"PNG" in first[:8] or b"<svg" in first)


def test_an_interrupted_save_leaves_the_earlier_figure(tmp_path, monkeypatch):
    path = plots.save(FIGURES["weight curves"](), tmp_path, "weights")
    earlier = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        plots.save(FIGURES["cost"](), tmp_path, "weights")
    assert path.read_bytes() == earlier and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "names",
    [
        ["nano-mamba", "tiny-mamba", "state-spaces/mamba-130m-hf", "nano-mamba + bm25", "falcon-mamba-7b"],
        ["nano-mamba2", "AntonV/mamba2-130m-hf", "state-spaces/mamba-2-370m"],
        ["nano-bert", "bert-base-uncased", "FacebookAI/roberta-large", "microsoft/deberta-v3-base"],
        ["nano-neox", "EleutherAI/pythia-160m"],
        ["bm25", "bm25-tuned"],
    ],
)
def test_a_family_looks_the_same_whatever_its_member(names):
    assert len({look(name) for name in names}) == 1


def test_a_folder_looks_like_the_last_family_in_its_path_and_is_named_from_there_on():
    for folder, shown, like in [
        ("/home/mamba-study/bert", "…/bert", "nano-bert"),
        ("/home/opt/mamba-130m/checkpoint-500", "…/mamba-130m/checkpoint-500", "nano-mamba"),
        ("/data/rankmamba/models/own", "…/own", None),
    ]:
        assert brief(folder) == shown and brief(f"{folder} + bm25") == f"{shown} + bm25"
        assert look(folder) == look(f"{folder} + bm25") == (look(like) if like else OTHER)
    assert brief("state-spaces/mamba-130m-hf") == "state-spaces/mamba-130m-hf"
    rows = plots.forest({"bm25": values(0), "/home/mamba-study/bert": values(1)}).axes[0].get_yticklabels()
    assert [row.get_text() for row in rows] == ["bm25", "…/bert"]


def test_systems_stand_by_family_each_beside_its_mixture():
    shuffled = [
        "nano-mamba2",
        "other",
        "nano-mamba + bm25",
        "nano-neox",
        "bm25-tuned",
        "nano-mamba",
        "minilm-l6",
        "bm25",
        "nano-bert",
    ]
    expected = [
        "bm25",
        "bm25-tuned",
        "minilm-l6",
        "nano-bert",
        "nano-neox",
        "nano-mamba",
        "nano-mamba + bm25",
        "nano-mamba2",
        "other",
    ]
    assert sorted(shuffled, key=order) == expected


def test_a_share_is_written_only_where_its_bar_has_room_for_it():
    parts = {"scan": 12.0, "projections": 88.0}
    rows = [("nano-mamba", scale, part) for scale in (1.0, 0.1) for part in parts]
    table = pd.DataFrame(
        [(f"{system} {scale}", "training", part, scale * parts[part]) for system, scale, part in rows],
        columns=["system", "mode", "part", "us"],
    )
    written = [text.get_text() for text in profile_plots.parts(table).axes[0].texts]
    assert written == ["12%", "88%", "88%"]


def test_the_systems_of_the_study_differ_in_colour_in_marker_and_in_line():
    for part in zip(*(look(system) for system in STUDY), strict=True):
        assert len(set(part)) == len(STUDY)


# linear RGB as seen without one kind of cone (Machado et al. 2009, severity 1)
VISION = {
    "normal": np.eye(3),
    "protan": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deutan": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritan": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def lab(color: str, vision: np.ndarray) -> np.ndarray:
    srgb = np.array(to_rgb(color))
    linear = np.clip(vision @ np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    relative = to_xyz @ linear / [0.9505, 1.0, 1.089]
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_the_colour_blind(vision):
    for one, other in itertools.combinations([style.color for style in FAMILIES.values()], 2):
        assert np.linalg.norm(lab(one, VISION[vision]) - lab(other, VISION[vision])) > 12, (one, other)


def test_the_forest_shows_the_means_and_intervals_the_baseline_first():
    figure = plots.forest(VALUES, "RR@100")
    means = {x for x, _ in drawn(figure)}
    for system, tables in VALUES.items():
        interval = summarise(tables)["RR@100"]
        bars = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [interval["low"], interval["high"]]]
        assert [bar.get_color() for bar in bars] == [look(system).color]
        assert interval["mean"] in means
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ROWS


def drawn(figure: Figure):
    for line in figure.axes[0].lines:
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            yield float(x), float(y)


def test_guessing_is_drawn_at_the_logarithm_of_the_group_size():
    figure = plots.training_curves({"nano-mamba": STEPS}, 8)
    assert any(y == math.log(8) for _, y in drawn(figure))
    assert "guessing: ln 8" in {text.get_text() for text in figure.axes[0].texts}


def test_curves_of_seeds_are_averaged_whatever_their_index():
    apart = [STEPS, STEPS.set_index(STEPS.index + 1000).assign(loss=STEPS["loss"].to_numpy() - 0.5)]
    (line,) = [line for line in plots.training_curves({"x": apart}).axes[0].lines if len(line.get_xdata()) == 100]
    (alone,) = [line for line in plots.training_curves({"x": [STEPS, STEPS]}).axes[0].lines if len(line.get_xdata()) == 100]
    assert np.asarray(line.get_ydata()) == pytest.approx(np.asarray(alone.get_ydata()) - 0.25)


def test_wins_and_losses_of_no_system_say_what_to_run():
    with pytest.raises(InputError, match="expected at least one system to compare with bm25, got none; run 02_train"):
        plots.wins_and_losses({"bm25": values(0)})


def test_wins_and_losses_give_the_shares_of_the_queries():
    base = pd.DataFrame({"RR@100": [0.5] * 10})
    system = pd.DataFrame({"RR@100": [1.0] * 3 + [0.5] * 5 + [0.25] * 2})
    texts = {text.get_text() for text in plots.wins_and_losses({"bm25": base, "x": system}).axes[0].texts}
    assert texts == {"better\n30%", "same\n50%", "worse\n20%"}


@pytest.mark.parametrize("limit", [7, 128, 500, 10_000])
def test_the_length_limit_falls_between_two_bars_and_no_document_is_lost(limit):
    lengths = np.random.default_rng(0).lognormal(4.6, 0.6, 2_000).astype(int)
    axes = plots.document_lengths(lengths, limit).axes[0]
    bars = [bar for container in axes.containers for bar in container if bar.get_height() > 0]
    assert sum(bar.get_height() for bar in bars) == len(lengths)
    whole = sum(bar.get_height() for bar in bars if bar.get_x() + bar.get_width() <= limit + 0.51)
    assert whole == (lengths <= limit).sum()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).map(sorted), st.floats(0.01, 0.2))
def test_labels_are_moved_apart_in_order_only_if_they_touch_and_stay_in_the_panel_if_they_fit(wanted, gap):
    places = plots._spread(wanted, gap)
    assert all(after - before > gap * (1 - 1e-6) for before, after in itertools.pairwise(places))
    if gap * (len(wanted) - 1) <= 1:
        assert places[0] >= -1e-9 and places[-1] <= 1 + 1e-9
    if all(after - before >= gap for before, after in itertools.pairwise(wanted)):
        assert places == pytest.approx(wanted)


def test_the_users_own_settings_of_matplotlib_reach_no_figure():
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "savefig.format": "pdf"}):
        picture = FIGURES["answer positions"]()._repr_png_()
    assert picture == FIGURES["answer positions"]()._repr_png_()
