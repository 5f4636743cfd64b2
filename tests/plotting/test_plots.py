"""The picture of head roles: it is a PNG, and its colours are the map."""

import matplotlib.image
import numpy as np
import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.plotting.attention import plot_heads

RED = np.array([0xB3, 0x20, 0x2F])
NONE, ONE, ALL = ((0, 1), (), (), ()), ((0, 1), (), (1,), ()), ((0, 1),) * 4


@pytest.fixture
def red(tmp_path):
    """How many pixels of a map's picture have the colour of retrieval heads, and the picture's shape."""

    def draw(retrieval, **options):
        head_map = HeadMap(len(retrieval), 2, retrieval, model="a $model$ of {tests}")
        plot_heads(head_map, tmp_path / "heads.png", **options)
        assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
        pixels = np.rint(255 * matplotlib.image.imread(tmp_path / "heads.png")[..., :3]).astype(int)
        return int((pixels == RED).all(axis=-1).sum()), pixels.shape

    return draw


def test_each_retrieval_head_is_one_cell_more(red):
    (none, shape), (one, _), (every, same) = red(NONE), red(ONE), red(ALL)
    assert shape == same
    cell = one - none
    assert cell > 1000
    assert every - none == pytest.approx(6 * cell, rel=0.02)


def test_picture_grows_with_the_map(red):
    (_, small), (_, large) = red(NONE), red(((0, 1), *[()] * 39))
    assert large[1] > small[1]
    assert large[0] == small[0]


def test_legend_tells_what_sparse_heads_read(red, tmp_path):
    red(ONE)
    plain = (tmp_path / "heads.png").read_bytes()
    red(ONE, sparse_share=0.125)
    assert (tmp_path / "heads.png").read_bytes() != plain
