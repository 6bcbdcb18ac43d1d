"""Converts the optimizer of transformers' `TrainingArguments` to a config.

`from_hf_args` reads `optim`, `optim_args` and `optim_target_modules`:

  Config(**from_hf_args('galore_adamw_8bit_layerwise', 'rank=512', MODULES),
         learning_rate=1e-5, ...)

The names of other libraries; '-' marks an option that does not exist there:

| here | galore-torch, transformers, axolotl | LLaMA-Factory |
| --- | --- | --- |
| `rank` | `rank` | `galore_rank`, `apollo_rank` (16) |
| `gap` | `update_proj_gap` | `galore_update_interval` |
| `scale` | `scale` | `galore_scale` (2.0), `apollo_scale` (32.0) |
| `side` | `proj_type` | `galore_proj_type` |
| `side='left'` | `proj_type='right'`: weights are [out, in] | the same |
| `channels=False` | `scale_type='tensor'` | `apollo_scale_type` |
| `targets` | `optim_target_modules` | `galore_target` |
| `update=Layerwise()` | `optim='..._layerwise'` | `galore_layerwise` |
| `Layerwise(accumulate=)` | refused | refused |
| `basis_bits=4` | axolotl: `qgalore_proj_bits` | - |
| `switch_every` of BAdam | - | `badam_switch_interval` (50) |
| `clip_norm` | `max_grad_norm` | `max_grad_norm` |

Differences for the same arguments:

* With layer-wise updates, transformers rejects gradient accumulation and DDP,
  clips gradients that are already freed, and reports a dummy's learning rate.
  Its `galore_adafactor_layerwise` does not start, because `relative_step` stays
  on together with a learning rate. Here, a layer-wise step gives the result of
  the whole-tree step, clipped by the global norm.
* In transformers, GaLore ignores `weight_decay`, betas and epsilon of
  `TrainingArguments` and uses its own; the 8-bit optimizer has a decay of 0.01
  and an epsilon of 1e-8. (APOLLO reads betas and epsilon, which is 1e-8 too.)
  Here they are arguments of the preset:
  `dataclasses.replace(found['optimizer'], weight_decay=0.01)`.
* In transformers, targets may select some of the layers. Here a stack of layers
  is one target, and a pattern that selects only some layers is an error. Full
  names of modules must cover every layer up to the highest one, or
  `num_layers`.
* A target that matches no linear module is an error here; transformers ignores
  it.
* A rank that is larger than a matrix is an error here; transformers reduces it.
* APOLLO's sketch is drawn from a seed at each step. `proj=svd` is not
  implemented.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from models import huggingface_config
from train.config import Layerwise, WholeTree
from train.optimizers.registry import CLASSES

_LAYERS = 128
"""Number of layers to try names of, if no target is a module's full name."""


class _Key(NamedTuple):
  """A key of optim_args, and its meaning here."""

  option: str | None
  """Name of the preset's option; None if the preset has no such option."""
  default: str
  """Default of transformers, as text."""
  values: Callable[[str], Any] | Mapping[str, Any]
  """Converts the text of a value to the option's value."""


# PyTorch's weights are [out, in], so left and right are exchanged.
_SIDES = {
  'std': 'std',
  'reverse_std': 'reverse_std',
  'full': 'full',
  'left': 'right',
  'right': 'left',
}
_GALORE = {
  'rank': _Key('rank', '128', int),
  'update_proj_gap': _Key('gap', '200', int),
  'scale': _Key('scale', '0.25', float),
  'proj_type': _Key('side', 'std', _SIDES),
}
_APOLLO = _GALORE | {
  'scale': _Key('scale', '1.0', float),
  'scale_type': _Key('channels', 'channel', {'channel': True, 'tensor': False}),
  'proj': _Key(None, 'random', {'random': None}),
}

# Values of `optim`, without the suffix '_layerwise': our method, and the keys
# of optim_args that it accepts.
_OPTIMIZERS = {
  'galore_adamw': ('Galore', _GALORE),
  'galore_adamw_8bit': ('Galore8bit', _GALORE),
  'galore_adafactor': ('GaloreAdafactor', _GALORE),
  'apollo_adamw': ('Apollo', _APOLLO),
  'lomo': ('Lomo', {}),
  'adalomo': ('AdaLomo', {}),
  'adamw_torch': ('AdamW', {}),
  'adamw_torch_fused': ('AdamW', {}),
  'adamw_8bit': ('Adam8bit', {}),
  'adamw_bnb_8bit': ('Adam8bit', {}),
}
_LAYERWISE = '_layerwise'


def from_hf_args(
  optim: str,
  optim_args: str | Mapping[str, Any] | None = None,
  targets: str | Iterable[str] | None = None,
  *,
  model_type: str = 'llama',
  num_layers: int | None = None,
) -> dict[str, Any]:
  """Returns the fields of `Config` that match transformers' arguments.

  The module's docstring lists names and differences.

  Args:
    optim: name of the optimizer in transformers.
    optim_args: 'rank=128,update_proj_gap=200,scale=0.25', or a mapping.
    targets: optim_target_modules: a regex that matches a module's whole name
      ('model.layers.0.self_attn.q_proj'), 'all-linear', or several strings,
      each of which is a part of a name or such a regex.
    model_type: as in config.json; it determines the names of the modules.
    num_layers: number of layers of the model. None derives it from full names
      of modules; without any, the targets must match in every layer of a model
      of any depth.

  Returns:
    The fields `optimizer` and `update`.

  Raises:
    ValueError: an argument is unknown, or not implemented here.

  Example:
    >>> found = from_hf_args('galore_adamw_layerwise', 'rank=64', ['mlp'])
    >>> found['update']
    Layerwise(clip='exact', slices=1, weights='arrays', ...)
    >>> found['optimizer'].rank, found['optimizer'].gap
    (64, 200)
    >>> found['optimizer'].targets[0]
    'blocks/mlp/gate/kernel'
  """
  names = [*_OPTIMIZERS]
  names += [
    f'{name}{_LAYERWISE}' for name, row in _OPTIMIZERS.items() if row[1]
  ]
  if optim not in names:
    raise ValueError(f'optim must be one of {names}, got {optim!r}')
  name, keys = _OPTIMIZERS[optim.removesuffix(_LAYERWISE)]
  options = _options(optim, keys, _parsed(optim_args))
  if targets is None:
    if keys:
      raise ValueError(
        f'{optim} needs targets, as it needs optim_target_modules there; '
        f"give 'all-linear', or parts of {_modules(model_type)}"
      )
  elif keys:
    given = targets if isinstance(targets, str) else list(targets)
    options['targets'] = _paths(given, model_type, num_layers)
  else:
    raise ValueError(
      f'targets are for optimizers that project, got {targets!r} for {optim}; '
      'leave them out'
    )
  in_backward = optim.endswith(_LAYERWISE) or 'lomo' in optim
  return {
    'optimizer': CLASSES[name](**options),
    'update': Layerwise() if in_backward else WholeTree(),
  }


def _parsed(optim_args: str | Mapping[str, Any] | None) -> dict[str, str]:
  """Parses optim_args to values by key, as transformers does."""
  if optim_args is None or isinstance(optim_args, Mapping):
    return {key: str(value) for key, value in (optim_args or {}).items()}
  pairs = [part for part in optim_args.replace(' ', '').split(',') if part]
  for part in pairs:
    if part.count('=') != 1:
      raise ValueError(
        f'optim_args must be key=value, divided by commas, got {part!r}'
      )
  return dict(part.split('=') for part in pairs)


def _options(
  optim: str, keys: Mapping[str, _Key], given: Mapping[str, str]
) -> dict[str, Any]:
  """Returns the preset's options; missing keys get transformers' defaults."""
  for key in given:
    if key not in keys:
      near = difflib.get_close_matches(key, keys, 1, 0)
      meant = f'; did you mean {near[0]}?' if near else ''
      raise ValueError(
        f'optim_args of {optim} must be of {[*keys]}, got {key!r}{meant}'
      )
  found = {}
  for key, row in keys.items():
    value = _value(key, given.get(key, row.default), row.values)
    if row.option is not None:
      found[row.option] = value
  return found


def _value(
  key: str, text: str, values: Callable[[str], Any] | Mapping[str, Any]
) -> Any:
  """Converts the text of a value, or raises ValueError."""
  if isinstance(values, Mapping):
    if text in values:
      return values[text]
    rule = f'one of {[*values]}'
  else:
    try:
      return values(text)
    except ValueError:
      rule = 'an integer' if values is int else 'a number'
  raise ValueError(f'optim_args: {key} must be {rule}, got {text!r}')


def _paths(
  targets: str | Sequence[str], model_type: str, num_layers: int | None
) -> tuple[str, ...]:
  """Returns our paths of the kernels that transformers would select."""
  kinds = huggingface_config.ARCHITECTURES
  if model_type not in kinds:
    raise ValueError(f'model_type must be of {[*kinds]}, got {model_type!r}')
  if num_layers is not None and num_layers < 1:
    raise ValueError(f'num_layers must be at least 1, got {num_layers}')
  modules = functools.partial(huggingface_config.linear_modules, model_type)
  count = num_layers or _counted(targets, modules()) or _LAYERS
  layers = list(map(modules, range(count)))
  names = {name for layer in layers for name in layer.values()}
  chosen = _chosen(targets, names, model_type)
  found = [
    path
    for path in modules()
    if _picked([layer[path] for layer in layers], chosen, targets)
  ]
  if len(found) > 1 and found[-1] == 'lm_head/kernel':
    # A tied model has no lm_head, and a pattern without a match is an error.
    # Joined to another pattern, it always has a match.
    found[-2:] = ['|'.join(found[-2:])]
  return tuple(found)


def _counted(
  targets: str | Sequence[str], first: Mapping[str, str]
) -> int | None:
  """Returns the number of layers that full names of modules imply, or None.

  Names of layer 0 only do not imply a number, since no model has one layer.

  >>> modules = huggingface_config.linear_modules('llama')
  >>> _counted(['model.layers.23.mlp.up_proj', 'q_proj'], modules)
  24
  >>> _counted(['mlp', 'layers.3'], modules)
  """
  ends = [name.partition('.0.')[2] for name in first.values() if '.0.' in name]
  full = re.compile(rf'[\w.]*\.(\d+)\.(?:{"|".join(map(re.escape, ends))})')
  given = [targets] if isinstance(targets, str) else targets
  # A name may be written as a regular expression, with escaped dots.
  matches = [full.fullmatch(target.replace(r'\.', '.')) for target in given]
  last = max((int(match[1]) for match in matches if match), default=0)
  return last + 1 if last else None


def _chosen(
  targets: str | Sequence[str], names: set[str], model_type: str
) -> set[str]:
  """Returns the modules that transformers' trainer selects.

  Raises:
    ValueError: a target matches no name.
  """
  whole = isinstance(targets, str)
  if whole and targets.replace('_', '-') == 'all-linear':
    return names
  found = {
    target: _matched(target, names, part=not whole)
    for target in ([targets] if whole else targets)
  }
  unmatched = [target for target, some in found.items() if not some]
  if unmatched or not found:
    shown = targets if whole or not found else unmatched
    raise ValueError(
      f'targets {_shown(shown)} match no linear module; a model has '
      f'{_modules(model_type)}'
    )
  return set().union(*found.values())


def _matched(target: str, names: set[str], *, part: bool) -> set[str]:
  """Returns the names that a target matches.

  Args:
    target: a name or a regex.
    names: names of modules.
    part: whether a part of a name is enough, as in a list of targets.
  """
  # A full name selects only itself, whether its dots are escaped or not.
  if target.replace(r'\.', '.') in names:
    return {target.replace(r'\.', '.')}
  try:
    pattern = re.compile(target)
  except re.error as error:
    raise ValueError(
      f'targets: {target!r} is no regular expression: {error}'
    ) from error
  return {
    name
    for name in names
    if (part and target in name) or pattern.fullmatch(name)
  }


def _picked(
  names: Sequence[str], chosen: set[str], targets: str | Sequence[str]
) -> bool:
  """Whether a module is selected in all layers.

  Raises:
    ValueError: it is selected in some layers, but not in all.
  """
  picked = [name in chosen for name in names]
  if any(picked) and not all(picked):
    raise ValueError(
      'targets must pick a module of all layers or of none, got '
      f'{_shown(targets)}, which picks {names[picked.index(True)]} but not '
      f'{names[picked.index(False)]}; a stack of layers is one target here. '
      'Give num_layers if the model has fewer layers'
    )
  return picked[0]


def _shown(targets: str | Sequence[str]) -> str:
  """Formats targets; if there are more than four, only the first four.

  >>> _shown(['a', 'b', 'c', 'd', 'e', 'f'])
  "['a', 'b', 'c', 'd'] and 2 more"
  """
  if isinstance(targets, str) or len(targets) <= 4:
    return repr(targets)
  return f'{list(targets[:4])!r} and {len(targets) - 4} more'


def _modules(model_type: str) -> str:
  """Returns the names of a layer's linear modules and of the head, as text."""
  return ', '.join(huggingface_config.linear_modules(model_type).values())
