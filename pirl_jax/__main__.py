"""python -m pirl_jax --config=NAME[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

The command pirl-jax, and launch.py of a checkout, under the name of the package.
"""

from pirl_jax.launching.command import start

if __name__ == "__main__":
  start()
