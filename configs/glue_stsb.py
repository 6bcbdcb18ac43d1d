"""STS-B: how alike are two sentences, 0 to 5? Pearson; the paper has 90.73.

Settings, command and memory: configs/glue_cola.py. Our number: not yet run.
"""

from configs.glue_cola import glue

config = glue(
  'stsb',
  examples=5749,
  labels=None,
  metric='pearson',
)
