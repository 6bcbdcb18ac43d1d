"""CoLA: is a sentence acceptable? Matthews' correlation; the paper has 60.35.

Settings, command and memory: configs/glue.py. Our number: not yet run.
"""

from configs.glue import glue

config = glue(
  'cola',
  examples=8551,
  labels=('unacceptable', 'acceptable'),
  metric='matthews',
  batch_size=32,
  learning_rate=3e-05,
)
