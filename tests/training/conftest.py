"""What tests of training share."""

from collections.abc import Iterator

import pytest

from lychee_jax.training import learn_heads


@pytest.fixture(scope="module")
def no_pictures() -> Iterator[None]:
    """Runs draw nothing: a picture takes longer than the small runs here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learn_heads, "plot_heads", lambda *args: None)
        patch.setattr(learn_heads, "plot_training", lambda *args: None)
        yield
