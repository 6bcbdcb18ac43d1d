"""Fine-tunes RoBERTa-base on RTE: does one sentence imply the other?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: accuracy 79.42 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'rte',
  examples=2490,
  labels=('entailment', 'not_entailment'),
)
