"""Fine-tunes RoBERTa-base on QNLI: does a sentence answer the question?

Source, settings, command and memory are as in configs/glue_cola.py.
Expected result: accuracy 92.24 in the GaLore paper (Table 4).
Status: not run yet.
"""

from configs.glue_cola import glue

config = glue(
  'qnli',
  examples=104743,
  labels=('entailment', 'not_entailment'),
)
