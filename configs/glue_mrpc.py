"""MRPC: do two sentences say the same? F1; the paper has 92.25.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'mrpc',
  examples=3668,
  labels=('not_equivalent', 'equivalent'),
  metric='f1',
  learning_rate=3e-5,
)
