"""SST-2: is a review good? Accuracy; the paper has 94.04.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'sst2',
  examples=67349,
  labels=('negative', 'positive'),
)
