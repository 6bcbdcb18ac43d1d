"""Methods that `--compare` and `--plot` plan, and the bar chart of `--plot`.

The methods are the rows of `train.method`; a new row is included without a
change here.
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
"""Class name of each method, by its title in tables."""

WHOLE_TREE = ('OptaxGalore',)
"""Methods that are not compared, because they need an update of all weights at
once. optax.contrib.galore projects every array of two axes. In a layer-wise
update it would also project the layers of a stack, which has three axes."""

LAYERWISE = ('Lomo', 'AdaLomo')
"""Methods that need a layer-wise update. With an update of all weights at once
they would be plain SGD and Adafactor."""

BARS = ('AdamW', '8-bit Adam', 'GaLore', '8-bit GaLore')
"""Methods that `--plot` draws with an update of all weights at once, as Figure
1 of the paper does."""

FINDERS = ('svd', 'gram', 'randomized', 'power')
"""Subspace finders that every low-rank method accepts."""


def methods(config: Config) -> dict[str, Config]:
  """Returns the config with each method, by the method's title.

  The update stays that of the config, except for methods in `LAYERWISE`.
  """
  updates = {name: layerwise(config) for name in LAYERWISE}
  return {
    title: with_method(config, name, updates.get(name, config.update))
    for title, name in TITLES.items()
    if name not in WHOLE_TREE
  }


def bars(config: Config) -> dict[str, Config]:
  """Returns the configs of the bars in Figure 1 of the paper, by title."""
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

  An optimizer of the same class keeps its options. Otherwise the new optimizer
  has its default options, except that it copies rank, gap and finder from the
  config's optimizer if both have them.
  """
  kind = CLASSES[name]
  if type(config.optimizer) is kind:
    return dataclasses.replace(config, update=update)
  own = {
    field.name: getattr(config.optimizer, field.name)
    for field in dataclasses.fields(config.optimizer)
  }
  # The default rank fits every model. The config's own rank replaces it.
  options: dict[str, Any] = {'rank': 0.25}
  for key in ('rank', 'gap'):
    if key in own:
      options[key] = own[key]
  if own.get('subspace') in FINDERS:
    options['subspace'] = own['subspace']
  known = {field.name for field in dataclasses.fields(kind)}
  options = {key: x for key, x in options.items() if key in known}
  return dataclasses.replace(config, optimizer=kind(**options), update=update)


def layerwise(config: Config) -> Layerwise:
  """Returns the config's layer-wise update, or a new one.

  The new one updates the embedding and the head in pieces, because a large
  vocabulary makes them the largest weights.
  """
  if isinstance(config.update, Layerwise):
    return config.update
  return Layerwise(slices=32)


def plot(plans: Sequence[Plan], path: pathlib.Path) -> None:
  """Draws a stacked bar for each plan: the bytes of its parts."""
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
