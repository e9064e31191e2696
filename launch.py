"""python launch.py --config=configs/pirl.py[:VARIANT] [--workdir=DIR] [--config.FIELD=VALUE ...]

Runs the job that the config describes; see pirl_jax/launching/command.py.
"""

from pirl_jax.launching.command import start

if __name__ == "__main__":
  start()
