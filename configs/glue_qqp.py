"""QQP: are two questions the same? Accuracy; the paper has 91.06.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'qqp',
  examples=363846,
  labels=('not_duplicate', 'duplicate'),
)
