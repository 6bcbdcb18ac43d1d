"""MNLI: does a hypothesis follow, or not? Accuracy; the paper has 87.00.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'mnli',
  examples=392702,
  labels=('entailment', 'neutral', 'contradiction'),
  validation='validation_matched',
)
