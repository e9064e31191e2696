from pirl_jax.storage.settings import first_difference, flatten


def test_groups_become_flat_names():
  assert flatten({"a": 1, "b": {"c": 2, "d": {"e": (3,)}}}) == {"a": 1, "b.c": 2, "b.d.e": (3,)}


def test_the_first_difference_is_told_with_both_values():
  assert first_difference({"b.k": 5, "a": "x"}, {"a": "x", "b.k": 6, "c": 1}) == "b.k=5, and now it is 6"
  assert first_difference({"b": 1}, {"a": "x", "b": 2}) == "a=None, and now it is 'x'"
  assert first_difference({"a": "x"}, {"a": "x"}) == first_difference({"a": None}, {}) == ""
