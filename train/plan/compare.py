"""The methods that a plan compares, and their picture.

They are the rows of `train.method`; a new one is compared by being there.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from train.config import Config, Layerwise, Update, WholeTree
from train.method import CLASSES, METHODS
from train.plan.cards import GPUS
from train.plan.footprint import Plan

GIB = 2**30

TITLES = {row.title: name for name, row in METHODS.items()}
"""Name of a method's class by what a table calls it."""

WHOLE_TREE = ('OptaxGalore',)
"""Not compared: it would take a layer of a stack for a matrix."""

LAYERWISE = ('Lomo', 'AdaLomo')
"""Those that are nothing but SGD or Adafactor in an update of the whole."""

BARS = ('AdamW', '8-bit Adam', 'GaLore', '8-bit GaLore')
"""Those whose update of the whole `--plot` draws, as the paper's Figure 1."""

FINDERS = ('svd', 'gram', 'randomized', 'power')
"""Those that every method with a low rank takes."""


def methods(config: Config) -> dict[str, Config]:
  """Returns the config with each method by its title, its update as it is."""
  updates = {name: layerwise(config) for name in LAYERWISE}
  return {
    title: with_method(config, name, updates.get(name, config.update))
    for title, name in TITLES.items()
    if name not in WHOLE_TREE
  }


def bars(config: Config) -> dict[str, Config]:
  """Returns the configs that Figure 1 of the paper compares."""
  layers = layerwise(config)
  whole = {
    title: with_method(config, TITLES[title], WholeTree()) for title in BARS
  }
  return whole | {
    'layer-wise 8-bit GaLore': with_method(config, 'Galore8bit', layers),
    'LOMO': with_method(config, 'Lomo', layers),
  }


def with_method(config: Config, name: str, update: Update) -> Config:
  """Returns a config with another optimizer.

  The config's own keeps its options; another one takes over its rank, gap and
  finder, if it has them, and is else what it is by default.
  """
  kind, ours = CLASSES[name], config.optimizer
  if type(ours) is not kind:
    # A rank that fits every model, where the config names none.
    options: dict[str, Any] = {'rank': 0.25} | {
      key: getattr(ours, key) for key in ('rank', 'gap') if hasattr(ours, key)
    }
    if getattr(ours, 'subspace', None) in FINDERS:
      options['subspace'] = ours.subspace
    known = {field.name for field in dataclasses.fields(kind)}
    ours = kind(**{key: options[key] for key in options if key in known})
  return dataclasses.replace(config, optimizer=ours, update=update)


def layerwise(config: Config) -> Layerwise:
  """Returns the config's layer-wise update, or one for a large vocabulary."""
  if isinstance(config.update, Layerwise):
    return config.update
  return Layerwise(slices=32)


def plot(plans: Sequence[Plan], path: pathlib.Path) -> None:
  """Draws where the bytes of each plan go, a bar for each."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(9, 5))
  names = [plan.method for plan in plans]
  below = [0.0] * len(plans)
  for part in plans[0].parts:
    sizes = [plan.parts[part] / GIB for plan in plans]
    axes.bar(names, sizes, bottom=below, label=part)
    below = [a + b for a, b in zip(below, sizes, strict=True)]
  axes.set_ylim(top=1.05 * max(below))
  first = plans[0]
  capacity = first.capacity_bytes / GIB
  if max(below) > capacity / 4:
    axes.axhline(capacity, color='black', linestyle='--')
  axes.set_ylabel('GiB')
  axes.set_title(
    f'{first.config}, {first.batch_size} x {first.sequence_length} tokens, '
    f'{GPUS[first.device].name}'
  )
  axes.tick_params(axis='x', labelrotation=15)
  axes.legend()
  figure.tight_layout()
  figure.savefig(path)
