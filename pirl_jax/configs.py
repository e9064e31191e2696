"""The folder `configs` of a checkout, importable as `pirl_jax.configs`.

An installed package has the folder itself in this place (see pyproject.toml), and no top-level `configs` that other
people's could clash with.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "configs")]
