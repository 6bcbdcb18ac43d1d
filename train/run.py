"""This module holds a run's directory: what is in it and where it stands."""

import dataclasses
import json
import pathlib
import re

from train.config import Config, differences, from_json, to_json
from train.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Run:
  """The directory of one run, and the names in it."""

  directory: pathlib.Path

  @property
  def config_path(self) -> pathlib.Path:
    """The configuration, as JSON."""
    return self.directory / 'config.json'

  @property
  def tokenizer_path(self) -> pathlib.Path:
    """The sentencepiece model."""
    return self.directory / 'tokenizer.model'

  @property
  def metrics_path(self) -> pathlib.Path:
    """One JSON object a line, one or two lines a step."""
    return self.directory / 'metrics.jsonl'

  @property
  def curves_path(self) -> pathlib.Path:
    """The picture of the losses."""
    return self.directory / 'curves.png'

  @property
  def checkpoints_path(self) -> pathlib.Path:
    """Where Orbax keeps the checkpoints, one directory a step."""
    return self.directory / 'checkpoints'

  def create(self, config: Config, tokenizer: Tokenizer) -> None:
    """Writes the first files; nothing of a run exists before."""
    self.directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(self.tokenizer_path)
    # Last: a directory is a run once it holds the configuration.
    self.config_path.write_text(json.dumps(to_json(config), indent=2) + '\n')

  def config(self) -> Config:
    """Reads the configuration."""
    if not self.config_path.is_file():
      raise FileNotFoundError(
        f'{self.directory} is not a run: it has no {self.config_path.name}'
      )
    try:
      return from_json(Config, json.loads(self.config_path.read_text()))
    except (AttributeError, KeyError, TypeError) as error:
      raise ValueError(
        f'{self.config_path} is no configuration of this version: {error}'
      ) from error

  def tokenizer(self) -> Tokenizer:
    """Reads the tokenizer."""
    return Tokenizer.load(self.tokenizer_path)

  def check(self, config: Config) -> None:
    """Raises ValueError where the run was started with another config."""
    differ = differences(self.config(), config)
    if differ:
      listing = '; '.join(
        f'{name} is {ours!r} in the run and {theirs!r} now'
        for name, (ours, theirs) in differ.items()
      )
      raise ValueError(
        f'cannot resume {self.directory} with another config: {listing}. '
        'Give the same values, or start a new run without --resume'
      )


def new(directory: pathlib.Path | None, name: str) -> Run:
  """Returns a run that does not exist yet: `directory`, or a free runs/name."""
  if directory is None:
    taken = numbered(name)
    number = max(taken, default=0) + 1
    suffix = '' if number == 1 else f'-{number}'
    return Run(pathlib.Path('runs') / f'{name}{suffix}')
  if directory.exists() and not (directory.is_dir() and empty(directory)):
    raise ValueError(
      f'{directory} exists; continue it with --resume, or name another --run'
    )
  return Run(directory)


def old(directory: pathlib.Path | None, name: str) -> Run:
  """Returns a run to resume: `directory`, or the newest of runs/name."""
  if directory is not None:
    return Run(directory)
  runs = numbered(name)
  if not runs:
    raise FileNotFoundError(f'no run of {name} in runs/ to resume')
  return Run(runs[max(runs)])


def numbered(name: str) -> dict[int, pathlib.Path]:
  """Returns the directories runs/name, runs/name-2, ... by their number."""
  pattern = re.compile(re.escape(name) + r'(?:-(\d+))?')
  found = {}
  for path in pathlib.Path('runs').glob(f'{name}*'):
    match = pattern.fullmatch(path.name)
    if match:
      found[int(match[1] or 1)] = path
  return found


def empty(directory: pathlib.Path) -> bool:
  """Whether nothing is in it."""
  return not any(directory.iterdir())
