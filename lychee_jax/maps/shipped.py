"""The head maps that the package ships: a JSON file each in this folder, found by the config that it was made for."""

from __future__ import annotations

from pathlib import Path

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig

SHIPPED = Path(__file__).parent


def find_map(config: ModelConfig, folder: Path = SHIPPED) -> HeadMap | None:
    """The map of `folder` whose `meta.fingerprint` is the config's, the first by file name; None if there is none.

    Raises:
        UserError: a file that is no head map, or one of another shape than its fingerprint's model.
    """
    wanted = config.fingerprint()
    for file in sorted(folder.glob("*.json")):
        head_map = HeadMap.load(file)
        if head_map.fingerprint == wanted:
            head_map.check(config, str(file))
            return head_map
    return None
