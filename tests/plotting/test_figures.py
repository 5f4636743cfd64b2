"""Names in pictures: letters that the default font lacks come from another font, or are written as escapes."""

from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.plotting import figures
from lychee_jax.plotting.attention import plot_heads
from lychee_jax.plotting.figures import fonts_for
from lychee_jax.plotting.scores import plot_heatmaps, plot_panels

ELSEWHERE = "\u1d84"  # matplotlib's STIX has it, and DejaVu Sans has not
NOWHERE = "\ufdd0"  # no letter, for ever


def drawn(monkeypatch: pytest.MonkeyPatch, draw) -> set[str]:
    """The texts of a picture as they are when it is written."""
    found: set[str] = set()
    write = figures.Figure.savefig

    def watched(self, *args, **options):
        write(self, *args, **options)
        found.update(text.get_text() for text in self.findobj(Text))

    monkeypatch.setattr(figures.Figure, "savefig", watched)
    draw()
    return found


def test_letters_come_from_a_font_that_has_them():
    assert ord(ELSEWHERE) not in get_font(findfont(FontProperties(family=["sans-serif"]))).get_charmap()
    families, lacking = fonts_for(frozenset("aé" + ELSEWHERE))
    assert len(families) == 1
    assert ord(ELSEWHERE) in get_font(findfont(FontProperties(family=[families[0]]))).get_charmap()
    assert not lacking
    assert fonts_for(frozenset("aλ→\n")) == ((), frozenset())
    assert fonts_for(frozenset("a" + NOWHERE))[1] == {NOWHERE}


@pytest.mark.parametrize("plot", [plot_panels, plot_heatmaps])
def test_scores_of_texts_with_any_name_have_neither_warning_nor_box(monkeypatch, tmp_path: Path, plot):
    name, path = f"研究 $x$ {ELSEWHERE}{NOWHERE} \U0001f600.txt", tmp_path / "results.png"
    more = {"at_most": None} if plot is plot_panels else {}
    values = {(name, 1024, 0.5, variant): 7.0 for variant in ("dense", "hybrid")}
    texts = drawn(monkeypatch, lambda: plot(values, path, title=f"perplexity · {name}", unit="%", **more))
    (title,) = (text for text in texts if text.startswith("perplexity"))
    assert "$x$" in title
    assert f"{ELSEWHERE}\\ufdd0" in title
    assert matplotlib.image.imread(path).ndim == 3
    assert any("$x$" in text for text in texts - {title})


def test_head_maps_of_models_with_any_name(tmp_path: Path):
    plot_heads(HeadMap(2, 2, ((0, 1), ()), model="通义千问"), tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000
