"""Runs an evaluation from its config: restores the networks, opens the images, runs the protocol, writes the results.

Each protocol is a file in `pirl_jax/evaluation/protocols/`. This file knows no protocol by name.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from pirl_jax.choosing.arranging import HOLDOUT
from pirl_jax.configs.evaluate import get_config
from pirl_jax.data import arrangement, overlap, sources
from pirl_jax.data.in_memory import InMemory, keep
from pirl_jax.errors import UserError
from pirl_jax.evaluation.inputs import Images, own_sizes
from pirl_jax.evaluation.outcome import Outcome, format_table
from pirl_jax.evaluation.protocol import Evaluation
from pirl_jax.evaluation.protocols import protocol_of
from pirl_jax.evaluation.subjects import Subject, open_subjects
from pirl_jax.figures.curves import save_plot
from pirl_jax.runs import Run
from pirl_jax.runtime import devices, out_of_memory
from pirl_jax.runtime import mesh as mesh_lib
from pirl_jax.storage.files import read_json, write_json
from pirl_jax.storage.formats import upgrade_config
from pirl_jax.storage.settings import difference, with_defaults

SOURCE_FIELDS = tuple(field.name for field in dataclasses.fields(sources.DataSettings)
                      if field.name not in sources.READING)
"""The fields of `DataSettings` that say which images are read."""

DATA_FIELDS = (*SOURCE_FIELDS, "test_split", "test_num_images")
"""The fields of `config.data` that say which images are read. Without `config.data.source` all of their defaults come
from the run; with `config.data.source` none does."""


def run(config: ConfigDict, workdir: str) -> dict[str, Outcome]:
  """Evaluates the checkpoints that `config` names. Writes the result file and the plot, and prints the table.

  The results of one run go into the run's folder, those of an ensemble A+B into runs/A+B, and those of a comparison of
  several into runs/compare. If `workdir` is given, it takes the place of all these folders.

  Returns:
    The outcome of each run or ensemble, by its label.

  Raises:
    UserError: the config, a checkpoint or the data does not fit the evaluation. In this case nothing has been compiled
      or written.
  """
  started = time.perf_counter()
  if not re.fullmatch(r"[A-Za-z0-9_.\-]+", config.name):
    raise UserError(f"config.name={config.name!r} becomes part of file names: letters, digits, _ . - only")
  if not 0 <= config.seed < 2**32:
    raise UserError(f"seed={config.seed} is not possible: it lies in [0, 2**32)")
  for line in devices.lines():
    print(line)
  mesh = mesh_lib.create_mesh()
  subjects = open_subjects(config.checkpoint, config.step, mesh)
  check_same_images({run.label: data_of(config, run) for subject in subjects for run in subject.runs})
  open_once = functools.cache(open_images)
  evaluations = [open_evaluation(config, subject, mesh, open_once, workdir, len(subjects)) for subject in subjects]
  first = evaluations[0]
  settings = {evaluation.subject.label: settings_of(evaluation) for evaluation in evaluations}
  result_path = first.output.with_name(first.output.name + ".json")
  older_step = check_same_settings(result_path, settings)

  outcomes = {}
  for evaluation in evaluations:
    print(f"{config.protocol} of {evaluation.subject.checkpoint}, step {evaluation.subject.step}")
    smaller = max(mesh.size, evaluation.train.batch_size // 4 // mesh.size * mesh.size)
    with out_of_memory.told(lambda smaller=smaller: "smaller batches need less, --config.data.batch_size="
                            f"{smaller}, and on the host fewer threads, --config.data.num_threads=1"):
      outcomes[evaluation.subject.label] = measure(evaluation)
  if older_step is not None and jax.process_index() == 0:
    older = result_path.with_name(f"{dated_name(config, first.data, older_step)}.json")
    for ending in (".json", ".png"):
      if result_path.with_suffix(ending).exists():
        result_path.with_suffix(ending).rename(older.with_name(f"{older.stem}{ending}"))
    print(f"the result of step {older_step} is now {older}")
  write_results(config, evaluations, settings, outcomes, result_path, time.perf_counter() - started)
  return outcomes


def data_of(config: ConfigDict, run: Run) -> dict[str, Any]:
  """Returns the fields `DATA_FIELDS` of the images to evaluate `run` on.

  Fields that the config gives have its values. The others come from the run or, if the config names another source,
  from the defaults of that source.

  Raises:
    UserError: `run` is a file of weights, which has no images, and the config names none.
  """
  given = {name: config.data[name] for name in DATA_FIELDS if config.data[name] is not None}
  if config.data.source is not None:
    found = source_defaults(given["source"]) | given
  elif config.data.root is not None and (arranged := other_folder(config.data.root, given, own_data(run))):
    found = arranged
  else:
    found = own_data(run) | given
    if not found["source"]:
      raise UserError(f"{run.folder} holds weights, and no word about images; name the images, --config.data.root=DIR, "
                      "or --config.data.source=... and the other fields of data")
  if found["test_split"] and "holdout" not in given:
    found["holdout"] = 0.0
  return _full_root(found)


def other_folder(root: str, given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the fields `DATA_FIELDS` of a folder of images other than that of the run; None if it is the run's own.

  What lies in the folder says what is split and what has labels, see `arrangement.arrangement_of`.

  Args:
    root: the folder.
    given: the fields that the user has set.
    own: the fields of the run; of a TFDS set, `root` may be the place to which its prepared files were moved.
  """
  if own["source"] == "folder" and _full_root({"root": root})["root"] == own["root"] and own["labels"] == "folder" or (
      own["source"] == "tfds" and not arrangement.holds_images(root)):
    return None
  found = arrangement.arrangement_of(root, split=given.get("split"))
  settings = source_defaults("folder") | {
    "formats": "all", "split": found.split, "test_split": found.test_split, "labels": found.labels} | given
  # The images that the run has held out of its own folder stay held out.
  share = own["holdout"] if own["source"] == "folder" and own["holdout"] else HOLDOUT
  return {"holdout": 0.0 if settings["test_split"] else share} | given | {
    name: value for name, value in settings.items() if name != "holdout"}


def source_defaults(source: str) -> dict[str, Any]:
  """Returns the default values of the fields `DATA_FIELDS` for the source of this name."""
  settings = dataclasses.asdict(sources.DataSettings(source=source))
  return {name: settings[name] for name in SOURCE_FIELDS} | sources.kind_of(source).defaults


def own_data(run: Run) -> dict[str, Any]:
  """Returns the fields `DATA_FIELDS` of the images that the run was trained and tested on."""
  data, held_out = run.meta["config"]["data"], run.meta["config"]["evaluate"]
  return _full_root({name: data[name] for name in DATA_FIELDS if name in data} | {
    "test_split": held_out["split"], "test_num_images": held_out["num_images"]})


def _full_root(data: dict[str, Any]) -> dict[str, Any]:
  return {**data, "root": os.path.abspath(os.path.expanduser(data["root"])) if data["root"] else ""}


def check_same_images(data: dict[str, dict[str, Any]]) -> None:
  """Raises UserError unless all runs are evaluated on the same images; `data` holds `DATA_FIELDS` by run label."""
  (label, first), *others = data.items()
  for other_label, other in others:
    for field in DATA_FIELDS:
      if other[field] != first[field]:
        raise UserError(f"the runs have different images (data.{field}: {first[field]!r} in {label}, "
                        f"{other[field]!r} in {other_label}); name the images for all runs with "
                        "--config.data.source=... and the other fields of data")


def sizes_of(config: ConfigDict, subject: Subject, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns `image_size`, `crop_fraction`, `batch_size` and `num_threads` of `Images`.

  Values that the config gives are taken; the others are those of the run's own test.

  Raises:
    UserError: a value is out of range, or the runs of an ensemble were trained on images of different sizes.
  """
  def sizes_of_run(run: Run) -> dict[str, Any]:
    own = own_sizes(run.meta["config"], num_devices=mesh.size)
    return own | {name: config.data[name] for name in own if config.data[name] is not None}

  first, *others = subject.runs
  sizes = sizes_of_run(first)
  for other in others:
    for name in ("image_size", "crop_fraction"):
      if (value := sizes_of_run(other)[name]) != sizes[name]:
        raise UserError(f"the networks of {subject.label} get the same images, but data.{name} is {sizes[name]} "
                        f"in {first.label} and {value} in {other.label}; choose one, "
                        f"--config.data.{name}={sizes[name]}")
  if sizes["batch_size"] % mesh.size or sizes["batch_size"] < 1:
    raise UserError(f"data.batch_size={sizes['batch_size']} does not divide among {mesh.size} devices; "
                    f"try --config.data.batch_size={max(1, sizes['batch_size'] // mesh.size) * mesh.size}")
  for name in ("image_size", "num_threads"):
    if sizes[name] < 1:
      raise UserError(f"data.{name}={sizes[name]} is not possible: a whole number from 1 is needed")
  if not 0.1 <= sizes["crop_fraction"] <= 1:
    raise UserError(f"data.crop_fraction={sizes['crop_fraction']} is not possible: it lies in [0.1, 1]")
  return sizes


def open_evaluation(config: ConfigDict, subject: Subject, mesh: jax.sharding.Mesh, open_fn: Callable, workdir: str,
                    num_subjects: int) -> Evaluation:
  """Returns the evaluation of one subject. Its images are opened and everything is checked; nothing is computed yet.

  Args:
    config: of the evaluation.
    subject: what is evaluated.
    mesh: the devices.
    open_fn: `open_images`, cached so that several subjects share the opened images.
    workdir: folder for the results, "" for the default folder.
    num_subjects: number of subjects that are evaluated together.

  Raises:
    UserError: a setting does not fit the network or the images.
  """
  data = data_of(config, subject.runs[0])
  sizes = sizes_of(config, subject, mesh)
  own = subject.runs[0].meta["config"]["data"]
  decoding = {name: own[name] if config.data[name] is None else config.data[name]
              for name in (*sources.DECODING, "kept_side")}

  def open_split(split: str, class_names: tuple[str, ...] | None = None, num_images: int = data["num_images"],
                 held_out: bool = False) -> Images:
    which = {name: data[name] for name in SOURCE_FIELDS} | {
      "split": split, "num_images": num_images, "holdout": data["holdout"] if split == data["split"] else 0.0}
    settings = sources.DataSettings(**which, image_size=sizes["image_size"], **decoding)
    return Images(open_fn(settings, class_names, held_out), **sizes)

  train = open_split(data["split"])
  test = None
  if data["test_split"] or data["holdout"]:
    test = open_split(data["test_split"] or data["split"], train.source.class_names or None, data["test_num_images"],
                      not data["test_split"])
    warn_of_overlap(train.source, test.source)
  folder = Path(workdir) if workdir else subject.folder if num_subjects == 1 else Path("runs/compare")
  output = folder / "results" / result_name(config, subject, data)
  protocol = protocol_of(config.protocol)
  settings = protocol.settings(**config[config.protocol])
  evaluation = Evaluation(config, settings, subject, data, train, test, open_split, mesh, Path(), output)
  protocol.check(evaluation)
  digest = hashlib.sha256(json.dumps(settings_of(evaluation), sort_keys=True).encode()).hexdigest()[:12]
  return dataclasses.replace(
    evaluation, snapshots=output.parent / "unfinished" / f"{output.name}-{digest}",
    output=output if num_subjects == 1 else output.with_name(config.name))


def open_images(settings: sources.DataSettings, class_names: tuple[str, ...] | None, held_out: bool) -> sources.Source:
  """Returns the images, see `sources.open_source`, and prints their description."""
  images = sources.open_source(settings, class_names=class_names, held_out=held_out)
  print(f"images: {images.description}")
  return keep(images, settings.kept_side)


@functools.cache  # several runs are evaluated on the same images
def warn_of_overlap(train: sources.Source, test: sources.Source) -> None:
  """Prints a warning if held-out images are training images, too."""
  if warning := overlap.warning(train, test):
    print(warning)


def result_name(config: ConfigDict, subject: Subject, data: dict[str, Any]) -> str:
  """Returns the name of the result file, without ending.

  The name is NAME. It is NAME-DATA-STEP if the images are not the run's own or the checkpoint is not the newest.
  """
  # The field `labels` is left out: the same images, now with labels, are still the run's own images.
  other_data = any(data[name] != own for run in subject.runs for name, own in own_data(run).items() if name != "labels")
  if not other_data and subject.newest:
    return config.name
  return dated_name(config, data, subject.step)


def dated_name(config: ConfigDict, data: dict[str, Any], step: int | str) -> str:
  """Returns NAME-DATA-STEP, with every character that is unsafe in a file name replaced by _."""
  name = data["name"] or Path(data["root"]).name or data["source"]
  return f"{config.name}-{re.sub(r'[^A-Za-z0-9_.]+', '_', name)}-{step}"


def settings_of(evaluation: Evaluation) -> dict[str, Any]:
  """Returns all settings that the figures depend on, as JSON values: equal settings mean equal figures."""
  settings = {
    "protocol": evaluation.config.protocol,
    evaluation.config.protocol: dataclasses.asdict(evaluation.settings),
    "seed": evaluation.config.seed,
    # The folder of the images does not matter; their fingerprints are compared instead.
    "data": {name: value for name, value in evaluation.data.items() if name != "root"},
    "train_fingerprint": evaluation.train.source.fingerprint,
    "test_fingerprint": evaluation.test.source.fingerprint if evaluation.test else None,
    "image_size": evaluation.train.image_size,
    "crop_fraction": evaluation.train.crop_fraction,
    "step": evaluation.subject.step,
    "weights": evaluation.subject.weights,
    "run_config": evaluation.subject.config,
  }
  # Results from before these fields existed do not have them.
  usual = sources.DataSettings(source="").decoding
  settings |= {name: value for name, value in dataclasses.asdict(evaluation.train.source.decoding).items()
               if value != getattr(usual, name)}
  if isinstance(evaluation.train.source, InMemory):
    settings["kept_side"] = evaluation.train.source.shorter_side
  if evaluation.subject.is_ensemble:
    settings["ensemble"] = [run.label for run in evaluation.subject.runs]
  return json.loads(json.dumps(settings))  # turns tuples into lists, as in the stored file


def check_same_settings(path: Path, settings: dict[str, dict[str, Any]]) -> int | str | None:
  """Compares the settings of this evaluation with those of an existing result file.

  Returns:
    The step of the existing result, if it differs from this evaluation in the step alone. None if there is no such
    file, or if the file holds a result of the same settings.

  Raises:
    UserError: the file holds a result of other settings, which would be overwritten.
  """
  if not path.exists():
    return None
  way_out = f"--config.name=NAME keeps both, or move {path} away"
  try:
    stored = json.loads(path.read_bytes())
    found = {label: _as_now(result["settings"])
             for label, result in stored.get("runs", {next(iter(settings)): stored}).items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
    raise UserError(f"{path} is not a result of this program, or cannot be read; {way_out}") from error
  if found.keys() != settings.keys():
    raise UserError(f"{path} holds the results of {', '.join(found)}, and now it is {', '.join(settings)}; {way_out}")
  older = None
  for label, now in settings.items():
    free = () if "weights" in found[label] else ("weights",)  # results were stored without before the field existed
    if len(settings) == 1 and found[label].get("step") != now["step"]:
      # The run has continued since then; its config may have changed in the fields that a resumed run may change.
      older, free = found[label].get("step"), ("step", "weights", "run_config.")
    if different := difference(found[label], now, free=free):
      field, before, value = different
      if field == "weights":
        raise UserError(f"{path} holds a result of the same settings and step but of other weights; {way_out}")
      raise UserError(f"{path} holds a result with {field}={before!r}, and now it is {value!r}; {way_out}")
  return older


def _as_now(settings: dict[str, Any]) -> dict[str, Any]:
  """Returns the settings of a stored result in the form of this version: fields that are missing get their defaults."""
  stored, data, protocol = settings["run_config"], settings["data"], settings["protocol"]
  configs = {run: upgrade_config(config) for run, config in stored.items()} if "ensemble" in settings else (
    upgrade_config(stored))
  # `root`, the folder of the images, is never stored.
  defaults = {"data": {name: value for name, value in source_defaults(data["source"]).items() if name != "root"},
              protocol: json.loads(json.dumps(get_config(protocol)[protocol].to_dict()))}
  return with_defaults({**settings, "run_config": configs}, defaults)


def measure(evaluation: Evaluation) -> Outcome:
  """Returns the outcome of the protocol.

  If this evaluation belongs to an interrupted comparison of several runs and was finished before, the stored outcome is
  returned.
  """
  done = evaluation.snapshots / "outcome.json"
  if (stored := read_json(done)) is not None:
    print("done before the interruption")
    return Outcome.from_json(stored)
  started = time.perf_counter()
  outcome = protocol_of(evaluation.config.protocol).measure(evaluation)
  outcome = dataclasses.replace(
    outcome, figures={**outcome.figures, "seconds": round(time.perf_counter() - started, 1)})
  if jax.process_index() == 0:
    write_json(done, outcome.to_json())
  return outcome


def write_results(config: ConfigDict, evaluations: Sequence[Evaluation], settings: dict[str, dict[str, Any]],
                  outcomes: dict[str, Outcome], path: Path, seconds: float) -> None:
  """Writes the result file and the plot; prints the table and the names of all files that were written."""
  if jax.process_index():
    return
  first = evaluations[0]
  device = jax.devices()[0]
  results = {
    (label := evaluation.subject.label): {
      "checkpoint": evaluation.subject.checkpoint, "step": evaluation.subject.step,
      "figures": outcomes[label].figures, "settings": settings[label]}
    for evaluation in evaluations}
  write_json(path, {
    "protocol": config.protocol, "seed": config.seed, "devices": f"{jax.device_count()} x {device.device_kind}",
    "jax": jax.__version__, **(results[first.subject.label] if len(results) == 1 else {"runs": results})})
  written = [path]
  curves = {label: outcome.curve for label, outcome in outcomes.items() if outcome.curve}
  if len(curves) == len(outcomes):
    plot = path.with_suffix(".png")
    save_plot(plot, f"{config.protocol}: {first.data['name'] or Path(first.data['root']).name or first.data['source']}",
              curves)
    written.append(plot)
  for evaluation in evaluations:
    shutil.rmtree(evaluation.snapshots, ignore_errors=True)
  unfinished = first.snapshots.parent
  if unfinished.is_dir() and not os.listdir(unfinished):
    unfinished.rmdir()
  print(format_table(f"{config.name}, {seconds:.0f} s", outcomes, share=protocol_of(config.protocol).share))
  written += [Path(name) for outcome in outcomes.values() for name in outcome.figures.get("written", ())]
  print("written: " + ", ".join(str(name) for name in written))
