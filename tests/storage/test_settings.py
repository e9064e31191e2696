"""Nested settings: flat names, the first difference, and the defaults of what is missing."""

import pytest

from pirl_jax.storage.settings import difference, field_problem, flatten, with_defaults

SETTINGS = {"seed": 0, "model": {"arch": "resnet8", "head": {"dim": 8}}, "log": {}}


def test_flat_names():
  assert flatten(SETTINGS) == {"seed": 0, "model.arch": "resnet8", "model.head.dim": 8}


@pytest.mark.parametrize("now, free, found", [
  (SETTINGS, (), None),
  ({**SETTINGS, "seed": 1}, (), ("seed", 0, 1)),
  ({**SETTINGS, "seed": 1}, ("seed",), None),
  ({"seed": 1, "model": {"arch": "resnet18", "head": {"dim": 8}}}, (), ("model.arch", "resnet8", "resnet18")),
  ({"seed": 0, "model": {"arch": "resnet8", "head": {"dim": 9}}}, ("model.",), None),
  ({"seed": 0, "model": {"arch": "resnet8", "head": {"dim": 9}}}, ("model.head",), ("model.head.dim", 8, 9)),
  ({"seed": 0, "model": {"arch": "resnet8"}}, (), ("model.head.dim", 8, None)),
  ({**SETTINGS, "zoom": {"factor": 2.0}}, (), ("zoom.factor", None, 2.0))])
def test_the_first_field_that_differs_is_named_with_both_values(now, free, found):
  assert difference(SETTINGS, now, free=free) == found


@pytest.mark.parametrize("field, near", [
  ("sed", "seed"), ("model.arc", "model.arch"), ("arch", "model.arch"), ("modle.arch", "model.arch"),
  ("dim", "model.head.dim or head.dim"), ("model.head.din", "model.head.dim"), ("head.din", "head.dim")])
def test_a_misspelt_field_is_answered_by_the_nearest(field, near):
  assert field_problem(field, {**SETTINGS, "head": {"dim": 3}}) == (
    f"there is no config field {field}; did you mean {near}?")


def test_a_field_that_is_like_no_other_or_is_there():
  assert field_problem("zzz.q", SETTINGS) == "there is no config field zzz.q"
  assert [field_problem(field, SETTINGS) for field in ("seed", "model", "model.head", "model.head.dim")] == [""] * 4


def test_missing_fields_and_groups_have_their_defaults_and_all_others_stay():
  defaults = {"seed": 5, "model": {"width": 1, "head": {"dim": 128, "mlp": False}}, "zoom": {"factor": 1.0}}
  filled = with_defaults(SETTINGS, defaults)
  assert filled == {"seed": 0, "model": {"arch": "resnet8", "width": 1, "head": {"dim": 8, "mlp": False}}, "log": {},
                    "zoom": {"factor": 1.0}}
  assert SETTINGS == {"seed": 0, "model": {"arch": "resnet8", "head": {"dim": 8}}, "log": {}}
  with pytest.raises((TypeError, AttributeError)):
    with_defaults({"model": 3}, defaults)
