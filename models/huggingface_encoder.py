"""Checkpoints of BERT and RoBERTa, as transformers writes them."""

from collections.abc import Mapping

from models.architecture import (
  LABELS,
  ONE_STACK,
  TRANSFORMER,
  Architecture,
  Fields,
  names_of,
  read_labels,
  write_labels,
)
from models.encoder import EncoderConfig

_MODULES = {
  'embed/tokens/embedding': 'embeddings.word_embeddings.weight',
  'embed/types/embedding': 'embeddings.token_type_embeddings.weight',
  'embed/positions/embedding': 'embeddings.position_embeddings.weight',
  'embed/norm': 'embeddings.LayerNorm',
  'blocks/attention/q': 'encoder.layer.{}.attention.self.query',
  'blocks/attention/k': 'encoder.layer.{}.attention.self.key',
  'blocks/attention/v': 'encoder.layer.{}.attention.self.value',
  'blocks/attention/o': 'encoder.layer.{}.attention.output.dense',
  'blocks/attention_norm': 'encoder.layer.{}.attention.output.LayerNorm',
  'blocks/mlp/up': 'encoder.layer.{}.intermediate.dense',
  'blocks/mlp/down': 'encoder.layer.{}.output.dense',
  'blocks/mlp_norm': 'encoder.layer.{}.output.LayerNorm',
}


def _names(prefix: str, dense: str, out: str) -> dict[str, str]:
  """Returns the names of the tensors of an encoder and its head, by our paths.

  Args:
    prefix: Prefix of the encoder's names.
    dense: Name of the head's first linear map.
    out: Name of the head's last linear map.
  """
  body = {path: prefix + name for path, name in _MODULES.items()}
  return names_of(body | {'head/dense': dense, 'head/out': out})


def _read(fields: Fields, kind: str) -> Fields:
  del kind
  return read_labels(fields)


def _write(config: EncoderConfig, kind: str) -> Fields:
  del kind
  fields = {'hidden_act': 'gelu', 'attention_probs_dropout_prob': 0.0}
  return fields | write_labels(config)


_BERT = Architecture(
  classes=(
    'BertForSequenceClassification',
    'BertModel',
    'BertForMaskedLM',
    'BertForPreTraining',
  ),
  fixed={'family': 'bert'},
  needed={'vocab_size': 'vocab_size'}
  | TRANSFORMER
  | {'num_positions': 'max_position_embeddings'},
  optional={
    'num_types': 'type_vocab_size',
    'pad_id': 'pad_token_id',
    'norm_eps': 'layer_norm_eps',
    'init_std': 'initializer_range',
    'dropout': 'hidden_dropout_prob',
  },
  read=_read,
  write=_write,
  others=LABELS,
  neutral=ONE_STACK
  | {
    'hidden_act': 'gelu',
    'position_embedding_type': 'absolute',
    'is_decoder': False,
  },
  # Options of the training, and options of the first BERT's pooler that
  # transformers does not use.
  harmless=frozenset(
    {
      'attention_probs_dropout_prob',
      'classifier_dropout',
      'tie_word_embeddings',
      'directionality',
      'pooler_fc_size',
      'pooler_num_attention_heads',
      'pooler_num_fc_layers',
      'pooler_size_per_head',
      'pooler_type',
    }
  ),
  names=_names('bert.', 'bert.pooler.dense', 'classifier'),
  prefix='bert.',
  head='head/',
  ignored=r'(bert\.)?embeddings\.position_ids|cls\..*',
  # The oldest checkpoints have these names.
  renamed={
    r'LayerNorm\.gamma$': 'LayerNorm.weight',
    r'LayerNorm\.beta$': 'LayerNorm.bias',
  },
)

ARCHITECTURES: Mapping[str, Architecture] = {
  'bert': _BERT,
  'roberta': _BERT._replace(
    classes=(
      'RobertaForSequenceClassification',
      'RobertaModel',
      'RobertaForMaskedLM',
    ),
    fixed={'family': 'roberta'},
    required=('pad_token_id',),
    names=_names('roberta.', 'classifier.dense', 'classifier.out_proj'),
    prefix='roberta.',
    ignored=r'(roberta\.)?(embeddings\.position_ids|pooler\..*)|lm_head\..*',
  ),
}
"""The architectures by model_type."""
