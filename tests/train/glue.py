"""A tiny RoBERTa with its tokenizer, and the GLUE data sets made offline."""

import json
import pathlib
import random

import jax
import tokenizers
from safetensors import numpy as safetensors
from tokenizers import models, pre_tokenizers, processors, trainers

from models import huggingface
from models.encoder import EncoderConfig, Layers

GOOD = 'fine warm clever bright lovely'.split()
BAD = 'dull cold clumsy grim awful'.split()
OTHER = 'the a film plot scene actor song of with and is was'.split()

# Text features and label names per task, as in TFDS. A task without label names
# has a number as its target.
GLUE = {
  'cola': (('sentence',), ('unacceptable', 'acceptable')),
  'sst2': (('sentence',), ('negative', 'positive')),
  'mrpc': (('sentence1', 'sentence2'), ('not_equivalent', 'equivalent')),
  'qqp': (('question1', 'question2'), ('not_duplicate', 'duplicate')),
  'stsb': (('sentence1', 'sentence2'), ()),
  'mnli': (
    ('premise', 'hypothesis'),
    ('entailment', 'neutral', 'contradiction'),
  ),
  'qnli': (('question', 'sentence'), ('entailment', 'not_entailment')),
  'rte': (('sentence1', 'sentence2'), ('entailment', 'not_entailment')),
}


def sentence(choice: random.Random, label: float) -> str:
  """Returns random words with one good or bad word, depending on the label."""
  words = choice.choices(OTHER, k=choice.randint(2, 8))
  words.insert(
    choice.randrange(len(words)), choice.choice([BAD, GOOD][label > 0])
  )
  return ' '.join(words)


def examples(names, labels, count, seed):
  """Yields the records of a data set. The last text determines the label."""
  choice = random.Random(seed)
  for index in range(count):
    label = (
      choice.uniform(0, 5) if not labels else choice.randrange(len(labels))
    )
    texts = [sentence(choice, choice.randint(0, 1)) for _ in names]
    texts[-1] = sentence(choice, label > 2.5 if not labels else label)
    yield dict(zip(names, texts, strict=True)) | {'label': label, 'idx': index}


def prepare(directory: pathlib.Path, task: str, count: int = 96) -> None:
  """Prepares glue/TASK as TFDS does, but without network and TensorFlow."""
  import numpy as np
  import tensorflow_datasets as tfds

  names, labels = GLUE[task]

  class Glue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = 'glue'
    VERSION = tfds.core.Version('2.0.0')
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name=task),)

    def _info(self):
      features = {name: tfds.features.Text() for name in names}
      features['idx'] = np.int32
      features['label'] = (
        tfds.features.ClassLabel(names=labels) if labels else np.float32
      )
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      held = 'validation_matched' if task == 'mnli' else 'validation'
      return {
        'train': self._generate_examples(count, 0),
        held: self._generate_examples(count // 4, 1),
      }

    def _generate_examples(self, count, seed):
      for record in examples(names, labels, count, seed):
        yield record['idx'], record

  Glue(
    config=task, data_dir=directory, file_format='array_record'
  ).download_and_prepare()


def roberta(directory: pathlib.Path, **changes) -> EncoderConfig:
  """Writes a random RoBERTa body, and a byte-level BPE with its template."""
  fast = tokenizers.Tokenizer(models.BPE())
  fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  fast.decoder = tokenizers.decoders.ByteLevel()
  special = ['<s>', '<pad>', '</s>', '<unk>', '<mask>']
  fast.train_from_iterator(
    [' '.join(GOOD + BAD + OTHER)],
    trainers.BpeTrainer(
      vocab_size=320,
      special_tokens=special,
      show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  fast.post_processor = processors.RobertaProcessing(
    ('</s>', 2), ('<s>', 0), add_prefix_space=False
  )
  config = EncoderConfig(
    vocab_size=fast.get_vocab_size(),
    width=16,
    mlp_width=32,
    num_heads=2,
    num_layers=2,
    num_positions=66,
    family='roberta',
    num_types=1,
    pad_id=1,
    norm_eps=1e-5,
    **changes,
  )
  params = jax.jit(Layers(config).init)(jax.random.key(0))
  huggingface.save(directory, config, params)
  file = directory / 'model.safetensors'
  tensors = safetensors.load_file(file)
  body = {k: x for k, x in tensors.items() if not k.startswith('classifier')}
  safetensors.save_file(body, file)
  fast.save(str(directory / 'tokenizer.json'))
  tokens = {'bos_token': '<s>', 'eos_token': '</s>', 'pad_token': '<pad>'}
  (directory / 'tokenizer_config.json').write_text(json.dumps(tokens))
  return config
