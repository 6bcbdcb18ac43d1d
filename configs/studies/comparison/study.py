"""The parts of a comparison: its methods, sizes, runs and data.

A study derives from `Study`, which defines its data, metrics and sizes.
`runner` trains its runs, `search` selects their learning rates, and `page`
writes the results.
"""

import abc
import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import optax

from models.lowrank import Adapter
from train.config import Config
from train.engine.task import Task


class Rung(NamedTuple):
  """One stage of successive halving."""

  steps: int
  """Training steps of each run."""
  pairs: int
  """Number of pairs of learning rates that are trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds:
  """Sizes of the search, which all runs in a results file share.

  A study derives a class from it that adds the sizes of its model and data.
  """

  first: tuple[Rung, ...]
  """The first round: successive halving of the pairs of learning rates."""
  tuned: int
  """Steps of the runs that tune three pairs of each finalist again."""
  final: int
  """Steps of the last runs of the finalists."""
  finalists: int
  """Number of finalists, not counting the baseline."""
  seeds: int
  """Number of seeds of the last runs."""


class Job(NamedTuple):
  """The settings that identify one run."""

  corpus: str
  method: str
  matrix: float
  """Learning rate of the matrices of the layers."""
  rest: float
  """Learning rate of all other parameters."""
  seed: int
  steps: int


Done: TypeAlias = dict[Job, dict[str, Any]]
"""The records of all finished runs."""

Score: TypeAlias = Callable[[Any], Any]
"""`batch -> result`, as `Study.score` at the trained weights."""


class Around(NamedTuple):
  """Settings of a run that the optimizer of a method may use."""

  rank: int
  gap: int
  """Steps between two refreshes of the subspace."""


class Method(NamedTuple):
  """One row of the tables: an optimizer and possibly an adapter."""

  make: Callable[[Around, Any], optax.GradientTransformation]
  """Builds the optimizer: `(run, learning rate) -> transformation`."""
  matrix: float = 3e-3
  """Lowest of the four rates in the grid for matrices, about 3 times apart."""
  rest: float = 3e-3
  """Lowest of the three rates in the grid for all other parameters."""
  adapter: Callable[[Around], Adapter] | None = None
  """Builds the adapter of the model, or None to train all weights."""
  tied: float | None = None
  """Rate of the matrices divided by the other rate; None tunes both."""


class Metric(NamedTuple):
  """A number that each run records."""

  key: str
  """Its name in the record of a run."""
  title: str
  """Its name in tables and pictures."""


@dataclasses.dataclass(frozen=True)
class Study(abc.ABC):
  """A comparison of methods: its data, metrics, sizes and page."""

  size: Rounds
  """Sizes that all runs in a results file share."""

  name: ClassVar[str]
  """Name of the module in configs.studies and of the results files."""
  methods: ClassVar[Mapping[str, Method]]
  """The methods that the study can train, by name."""
  usual: ClassVar[Sequence[str]]
  """Names of the methods that run by default."""
  baseline: ClassVar[str] = 'AdamW'
  """The method that all others are compared with."""
  corpora: ClassVar[Sequence[str]]
  """Names of the data sets. The first round uses the first of them."""
  metrics: ClassVar[Sequence[Metric]]
  """The numbers of the tables. The search minimizes the first of them."""
  rows: ClassVar[str]
  """The name of the items of the held-out data, in the plural."""
  unit: ClassVar[str]
  """The name of the items of the training data, in the plural. A run's record
  has their number under this key."""
  matrices: ClassVar[str] = 'blocks/(attention|mlp)/.*'
  """Regular expression of the paths that the rate of matrices is for."""
  options: ClassVar[Mapping[str, str]] = {}
  """Fields of `size` that the command line can set, and their help."""

  @property
  def metric(self) -> Metric:
    """The metric that the search minimizes."""
    return self.metrics[0]

  @property
  def shared(self) -> dict[str, Any]:
    """The settings that all runs in the results file share."""
    return {'size': dataclasses.asdict(self.size)}

  def command(self, job: Job) -> str:
    """Returns the command line that repeats a run."""
    module = f'configs.studies.{self.name}'
    return shlex.join(['python', '-m', module, '--run', *map(str, job)])

  @abc.abstractmethod
  def amount(self, steps: int) -> int:
    """Returns the number of `unit` in the batches of some steps."""

  @abc.abstractmethod
  def corpus(self, name: str, scratch: pathlib.Path) -> Any:
    """Returns the corpus with one of the names in `corpora`.

    Args:
      name: its name.
      scratch: an empty directory, for files that the corpus consists of.
    """

  @abc.abstractmethod
  def config(self, corpus: Any) -> Config:
    """Returns the config of all runs with a corpus.

    The runner sets optimizer, adapter, learning rate, steps and seed.
    """

  @abc.abstractmethod
  def around(self, steps: int) -> Around:
    """Returns the rank, and the gap of a run with a number of steps."""

  @abc.abstractmethod
  def data(self, config: Config) -> Any:
    """Returns the data of a config, as `Task.batches` reads them."""

  @abc.abstractmethod
  def held_out(self, config: Config, data: Any) -> Sequence[Any]:
    """Returns the held-out data, which score the weights of all runs."""

  def score(self, task: Task) -> Callable[[Any, Any], Any]:
    """Returns the function of weights and a batch that `measured` calls.

    It is compiled. By default it returns the task's loss and its sums.
    """
    return task.loss

  @abc.abstractmethod
  def measured(self, held_out: Sequence[Any], score: Score) -> dict[str, Any]:
    """Returns the numbers of a run on the held-out data.

    They are the value of each metric, and under 'rows' the first metric of each
    row, whose mean is the total.

    Args:
      held_out: the result of `held_out`.
      score: the function that `score` returns, at the trained weights.
    """

  @abc.abstractmethod
  def page(self, done: Done) -> str:
    """Returns the results page in Markdown."""
