"""Fine-tunes RoBERTa-base on CoLA: is a sentence grammatically acceptable?

This module also has the function `glue`, with the settings that all eight GLUE
tasks share.

Source: Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, 2024, Table 4
and Appendix D. RoBERTa-base, rank 4, 30 epochs, batches of 16, 512 tokens.
Command: python -m train.finetune configs/glue_cola.py --checkpoint DIR
DIR is a directory with roberta-base. This needs glue/cola as prepared by TFDS.
Expected memory: weights and optimizer state are 253 MB with GaLore of rank 4
and 747 MB with AdamW, according to the paper.
Expected result: Matthews correlation 60.35 in the paper.
Status: not run yet, because the weights and the data were not available.
"""

from train.config import Classifier, Config
from train.data.labelled import LabelledTfds, Metric
from train.method import Galore

EPOCHS = 30

TARGETS = (
  *(rf'blocks/attention/{name}/kernel' for name in 'qkvo'),
  *(rf'blocks/mlp/{name}/kernel' for name in ('up', 'down')),
)
"""Regexes for the projected kernels: query, key, value, intermediate dense and
both output dense."""


def glue(
  task: str,
  *,
  examples: int,
  labels: tuple[str, ...] | None,
  metric: Metric = 'accuracy',
  validation: str = 'validation',
  batch_size: int = 16,
  learning_rate: float = 1e-5,
) -> Config:
  """Returns the configuration of one GLUE task, as in Table 4 of the paper.

  Args:
    task: Name of the task in TFDS.
    examples: Number of training examples, which determines the number of steps.
    labels: Names of the labels, in order; None for a regression task.
    metric: Metric of the task, which selects the best epoch.
    validation: Name of the validation split.
    batch_size: Batch size; 32 for CoLA and 16 for the other tasks.
    learning_rate: Learning rate; 3e-5 for MRPC and CoLA, 1e-5 for the others.
  """
  epoch = -(-examples // batch_size)
  return Config(
    model=Classifier(num_labels=len(labels or ['number']), labels=labels),
    corpus=LabelledTfds(f'glue/{task}', validation=validation, metric=metric),
    optimizer=Galore(rank=4, gap=500, scale=4.0, targets=TARGETS),
    steps=EPOCHS * epoch,
    learning_rate=learning_rate,
    batch_size=batch_size,
    sequence_length=512,
    warmup=0.0,
    final=0.0,
    clip_norm=None,
    eval_every=epoch,
    save_every=epoch,
    save_best=True,
  )


config = glue(
  'cola',
  examples=8551,
  labels=('unacceptable', 'acceptable'),
  metric='matthews',
  batch_size=32,
  learning_rate=3e-5,
)
