"""Fine-tunes RoBERTa-base on SST-2: is a movie review positive?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: accuracy 94.04 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'sst2',
  examples=67349,
  labels=('negative', 'positive'),
)
