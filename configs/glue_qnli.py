"""QNLI: has a sentence the answer? Accuracy; the paper has 92.24.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'qnli',
  examples=104743,
  labels=('entailment', 'not_entailment'),
)
