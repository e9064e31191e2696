"""The state of a run that starts from given weights, of another run or of a file: `config.init_from`."""

from typing import Any

import jax
import jax.numpy as jnp

from pirl_jax.errors import UserError
from pirl_jax.method.state import TrainState
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.training.parts import Parts
from pirl_jax.weights.opening import locate_weights, open_any


def first_state(parts: Parts) -> TrainState:
  """Returns the state before the first step: a new one or, with `init_from`, one with the weights of a run or a file.

  The trunk is taken, and each head whose parameters have the same names and shapes; what was taken is printed. The
  memory bank and the momentum are new.

  Raises:
    UserError: `init_from` is neither a run nor weights (see `open_any`), or its trunk does not fit.
  """
  given = parts.config.init_from
  if not given:
    return parts.initial_state()
  path = locate_weights(given, field="--config.init_from")
  run = open_any(path, given, 0, parts.mesh, stem=parts.config.model.stem)
  theirs: Any = run.model.variables
  expected = jax.eval_shape(parts.initial_state)
  model = run.meta["config"]["model"]
  check_trunk(given, _shapes(expected.params["trunk"]), _shapes(theirs["params"]["trunk"]),
              " ".join(f"--config.model.{name}={model[name]}" for name in ("arch", "width", "stem")))
  taken = [name for name, own in expected.params.items() if _shapes(own) == _shapes(theirs["params"].get(name, {}))]
  state = parts.initial_state()
  whole = mesh_lib.whole(parts.mesh)

  def mixed(own: Any, other: Any) -> Any:
    return {name: jax.device_put(other[name], whole) if name in taken and name in other else value
            for name, value in own.items()}

  left = [name for name in expected.params if name not in taken]
  print(f"starts from {path}, step {run.step}: takes {', '.join(taken)}"
        + (f"; new, because their shapes differ or they are missing there: {', '.join(left)}" if left else ""))
  params, batch_stats = mixed(state.params, theirs["params"]), mixed(state.batch_stats, theirs["batch_stats"])
  encoder = state.momentum_encoder and jax.tree.map(jnp.copy, params)
  return state.replace(params=params, batch_stats=batch_stats, momentum_encoder=encoder)


def check_trunk(given: str, own: dict[str, Any], theirs: dict[str, Any], flags: str) -> None:
  """Raises UserError unless both trunks, given as shapes by name, have the same parameters.

  Args:
    given: the value of `init_from`.
    own, theirs: {name: shape} of the trunk of the run and of the given one.
    flags: with which the run would have the given trunk.
  """
  missing = sorted(own.keys() - theirs.keys())
  other = sorted(name for name in own.keys() & theirs.keys() if own[name] != theirs[name])
  over = sorted(theirs.keys() - own.keys())
  if missing or other or over:
    found = [(len(names), f"{what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})") for names, what in (
      (missing, "missing"), (other, "of another shape"), (over, "left over"))]
    raise UserError(f"--config.init_from={given}: its trunk does not fit this network: "
                    + "; ".join(f"{count} {text}" for count, text in found if count)
                    + f"; take that network: {flags}")


def _shapes(tree: Any) -> dict[str, Any]:
  return {jax.tree_util.keystr(path, simple=True, separator="/"): value.shape
          for path, value in jax.tree_util.tree_leaves_with_path(tree)}
