"""A study of methods that takes seconds."""

from configs.studies.comparison.study import Rung
from configs.studies.comparison.text import Size
from configs.studies.methods import Methods

SIZE = Size(
  width=32,
  num_layers=2,
  vocab_size=400,
  batch_size=2,
  sequence_length=32,
  eval_rows=4,
  first=(Rung(2, 3), Rung(3, 2), Rung(4, 1)),
  tuned=5,
  final=6,
  finalists=2,
  seeds=2,
)
SMALL = Methods(SIZE)
COUNT = 3 + 2 + 1
"""Runs of the first round for each method, without neighbours."""
