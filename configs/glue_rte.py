"""RTE: does a sentence follow from another? Accuracy; the paper has 79.42.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'rte',
  examples=2490,
  labels=('entailment', 'not_entailment'),
)
