"""Perplexity of texts and accuracy of choices, compared with plain formulas."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import huggingface
from models.llama import Layers, LlamaConfig
from tests.train.data import tiny
from train import evaluate
from train.data.tokenizer import load
from train.evaluate import Pair, Question
from train.tasks.text_model import Model

CONFIG = LlamaConfig(
  vocab_size=400, width=16, mlp_width=24, num_heads=2, num_layers=2
)
QUESTION = {'question': 'The lazy', 'choices': ['dog', 'fox'], 'answer': 0}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp('directory')
  params = jax.jit(Layers(CONFIG).init)(jax.random.key(3))
  params = jax.tree.map(
    lambda w: 20 * w if w.ndim > 1 else w, jax.device_get(params)
  )
  huggingface.save(path, CONFIG, params)
  return tiny.write(path)


@pytest.fixture(scope='module')
def model(directory):
  config, params = huggingface.load(directory)
  return Model(Layers(config), params, load(directory), 64)


@functools.cache
def logits(layers):
  return jax.jit(layers.logits)


def log_p(model, ids, length=64):
  """Returns the log-probability of each token after the first."""
  # Pad to one length, so that the model is compiled once. Later tokens do not
  # affect earlier ones.
  batch = {
    'inputs': np.int32([[*ids[:-1], *[0] * (length + 1 - len(ids))]]),
    'positions': np.arange(length, dtype=np.int32)[None],
    'segments': np.zeros((1, length), np.int32),
  }
  logits_TV = logits(model.layers)(model.params, batch)[0]
  log_p_TV = np.asarray(jax.nn.log_softmax(logits_TV))
  return log_p_TV[np.arange(len(ids) - 1), ids[1:]]


def test_likelihoods_do_not_depend_on_the_batch(model):
  rng = np.random.default_rng(0)
  pairs = [
    Pair(rng.integers(400, size=length).tolist(), num_scored)
    for length, num_scored in ((4, 3), (30, 1), (9, 2), (65, 64), (17, 5))
  ]
  found_n = evaluate.log_likelihoods(model, pairs, 64, batch_size=2)
  expected_n = [np.sum(log_p(model, ids)[-n:]) for ids, n in pairs]
  # The tolerance allows for float32 sums of up to 64 terms in a different
  # order.
  np.testing.assert_allclose(found_n, expected_n, rtol=1e-5)


def test_a_length_is_compiled_once(model, monkeypatch):
  traced = []

  def counted(self, params, batch):
    traced.append(batch['inputs'].shape)
    return jnp.zeros(batch['inputs'].shape)

  monkeypatch.setattr(Layers, 'nll', counted)
  pairs = [Pair(list(range(n)), 1) for n in (3, 40, 5, 17, 18, 16, 30, 9, 41)]
  evaluate.log_likelihoods(model, pairs, 48, batch_size=2)
  assert traced == [(2, 16), (2, 32), (2, 48)]


def test_a_choice_begins_with_its_space(model):
  tokenizer = model.tokenizer
  for context in ('The lazy', 'The lazy '):
    ids, num_scored = evaluate.joined(tokenizer, context, 'dog')
    assert ids == tokenizer.encode('The lazy dog').tolist()
    assert tokenizer.decode(ids[-num_scored:]) == ' dog'
  ids, num_scored = evaluate.joined(tokenizer, 'The lazy\n', 'dog')
  assert tokenizer.decode(ids[-num_scored:]) == '\ndog'
  ids, num_scored = evaluate.joined(tokenizer, '', 'dog')
  # The tokenizer has no BOS token. The EOS token precedes the text, so that its
  # first token is predicted as well.
  assert ids == [tokenizer.eos_id, *tokenizer.encode('dog')]
  assert num_scored == len(ids) - 1


def test_a_long_question_loses_its_beginning(model):
  questions = [Question('The lazy dog. ' * 30, ('fox', 'dog'), 0)]
  pairs = evaluate.encoded(model.tokenizer, 'q.jsonl', questions, 12)
  assert [len(ids) for ids, _ in pairs] == [13, 13]
  assert [model.tokenizer.decode(ids[-n:]) for ids, n in pairs] == [
    ' fox',
    ' dog',
  ]
  with pytest.raises(ValueError, match=r'q\.jsonl, question 1: .*at most --w'):
    evaluate.encoded(
      model.tokenizer, 'q.jsonl', [Question('a', ('b', 'xyz' * 9), 0)], 12
    )


def test_accuracies_by_hand():
  questions = [
    Question('', ('aaaa', 'b'), 0),
    Question('', ('a', 'b', 'caf\u00e9'), 2),
    Question('', ('a', 'b'), 1),
  ]
  # The log-probabilities per byte are -1 and -2; -2, -3 and -1.8 (five bytes);
  # -1 and -2.
  log_p_n = np.array([-4.0, -2.0, -2.0, -3.0, -9.0, -1.0, -2.0])
  right = evaluate.accuracies(questions, log_p_n)
  assert right['accuracy'].tolist() == [False, False, False]
  assert right['accuracy per byte'].tolist() == [True, True, False]
  assert evaluate.described(right) == (
    'accuracy 0.0000 (standard error 0.0000), '
    'accuracy per byte 0.6667 (standard error 0.3333), 3 questions'
  )


@pytest.mark.parametrize('name', ['question', 'prompt', 'context'])
@pytest.mark.parametrize(
  'answer, number', [(1, 1), ('B', 1), ('A', 0), ('fox', 1), ('dog', 0)]
)
def test_a_line_says_its_answer_in_three_ways(name, answer, number):
  line = {name: 'The', 'choices': ['dog', 'fox'], 'answer': answer}
  expected = Question('The', ('dog', 'fox'), number)
  assert evaluate.question({**line, 'source': 7}) == expected


def test_a_choice_that_is_a_letter_is_meant_itself():
  line = {'question': 'x', 'choices': ['B', 'A'], 'answer': 'A'}
  assert evaluate.question(line).answer == 1


def without(name):
  return {k: v for k, v in QUESTION.items() if k != name}


@pytest.mark.parametrize(
  'line, rule',
  [
    ('{"question"', 'line 3: '),
    ('[1]', 'line 3: must be a JSON object'),
    (json.dumps(without('question')), 'line 3: must have one text among'),
    (json.dumps({**QUESTION, 'prompt': 'a'}), 'line 3: must have one text'),
    (json.dumps({**QUESTION, 'question': 5}), 'line 3: must have one text'),
    (json.dumps(without('choices')), 'line 3: choices must be two texts'),
    (json.dumps({**QUESTION, 'choices': ['a']}), 'line 3: choices must be two'),
    (json.dumps({**QUESTION, 'choices': ['a', ' ']}), r'3: choices .*\[.*\]'),
    (json.dumps({**QUESTION, 'choices': 'ab'}), "3: choices must .* got 'ab'"),
    (
      json.dumps(without('answer')),
      r'answer must be a number in 0\.\.1.* None',
    ),
    (json.dumps({**QUESTION, 'answer': 2}), 'a letter of AB .* got 2'),
    (json.dumps({**QUESTION, 'answer': -1}), 'got -1'),
    (json.dumps({**QUESTION, 'answer': True}), 'got True'),
    (json.dumps({**QUESTION, 'answer': 'C'}), "got 'C'"),
    (json.dumps({**QUESTION, 'answer': 'AB'}), "got 'AB'"),
  ],
)
def test_a_line_that_is_no_question_is_named(line, rule, tmp_path, capsys):
  file = tmp_path / 'q.jsonl'
  file.write_text(f'{json.dumps(QUESTION)}\n\n{line}\n')
  with pytest.raises(ValueError, match=rf'q\.jsonl, .*{rule}'):
    evaluate.read_questions(str(file))
  # The directory does not exist, so the file must be checked before the model
  # is read.
  with pytest.raises(SystemExit):
    evaluate.main(['none', '--choices', str(file)])
  assert 'line 3' in capsys.readouterr().err


def test_choices_of_a_directory(directory, model, tmp_path, capsys):
  lines = [
    {'question': 'The lazy', 'choices': ['dog', 'quick brown'], 'answer': 0},
    {'context': 'Line 7 of', 'choices': ['many', 'x', 'y'], 'answer': 'many'},
    {'prompt': 'fox jumps', 'choices': ['over', 'dog'], 'answer': 'B'},
  ]
  file = tmp_path / 'q.jsonl'
  file.write_text('\n'.join(map(json.dumps, lines)))
  evaluate.main([str(directory), '--choices', str(file), '--batch-size', '2'])
  right = {'accuracy': [], 'accuracy per byte': []}
  for line, best in zip(lines, (0, 0, 1), strict=True):
    scores, context = [], next(iter(line.values()))
    for choice in line['choices']:
      known = model.tokenizer.encode(context)
      ids = model.tokenizer.encode(f'{context} {choice}').tolist()
      scores.append(log_p(model, ids)[len(known) - 1 :].sum())
    sizes = [len(choice) for choice in line['choices']]
    right['accuracy'].append(np.argmax(scores) == best)
    right['accuracy per byte'].append(
      np.argmax(np.divide(scores, sizes)) == best
    )
  right = {name: np.array(some) for name, some in right.items()}
  assert capsys.readouterr().out == f'{file}: {evaluate.described(right)}\n'


def test_texts_of_a_directory(directory, model, tmp_path, capsys):
  text = 'The quick brown fox said:\n\ncaf\u00e9 \U0001f600, line 7 of many.'
  (tmp_path / 'a.txt').write_text(f'\n{text}\n')
  lines = [json.dumps({'text': x}) for x in ('The fox', 'The lazy dog')]
  (tmp_path / 'b.jsonl').write_text('\n'.join(lines))
  files = [str(tmp_path / name) for name in ('a.txt', 'b.jsonl')]
  evaluate.main([str(directory), '--text', *files, '--window', '8'])
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith(f'{files[0]}: loss ')
  assert second.startswith(f'{files[1]}: loss ')
  values = dict(x.rsplit(' ', 1) for x in first.split(': ')[1].split(', '))
  # The document is cut into rows of 8 predictions, each without context from
  # the row before. The first token of the document is not predicted, so its
  # bytes are not counted.
  ids = [*model.tokenizer.encode(text).tolist(), model.tokenizer.eos_id]
  nll = -sum(
    log_p(model, ids[start : start + 9]).sum()
    for start in range(0, len(ids) - 1, 8)
  )
  mean = nll / (len(ids) - 1)
  assert float(values['loss']) == pytest.approx(mean, abs=2e-4)
  assert float(values['perplexity']) == pytest.approx(math.exp(mean), rel=1e-3)
  num_bytes = len(text.encode()) - model.tokenizer.bytes_V[ids[0]]
  bits = nll / math.log(2) / num_bytes
  assert float(values['bits per byte']) == pytest.approx(bits, abs=2e-4)


@pytest.mark.parametrize(
  'args, message',
  [
    ([], 'has no validation split: name --text or --choices'),
    (['--text', 'none.txt'], "no file matches 'none.txt'"),
    (['--choices', 'none.jsonl'], "no file matches 'none.jsonl'"),
    (['--window', '0'], '--window must be at least 1, got 0'),
    (['--batch-size', '0'], '--batch-size must be at least 1, got 0'),
  ],
)
def test_it_refuses_missing_texts_and_bad_options(
  directory, args, message, capsys
):
  with pytest.raises(SystemExit):
    evaluate.main([str(directory), *args])
  out, err = capsys.readouterr()
  assert out == '' and message in err and err.count('\n') == 1


def test_a_tokenizer_of_another_model(directory, tmp_path, capsys):
  small = LlamaConfig(
    vocab_size=100, width=16, mlp_width=24, num_heads=2, num_layers=1
  )
  shapes = jax.eval_shape(Layers(small).init, jax.random.key(0))
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  huggingface.save(tmp_path, small, params)
  tiny.write(tmp_path)
  with pytest.raises(SystemExit):
    evaluate.main([str(tmp_path), '--text', str(directory / 'config.json')])
  assert 'at most vocab_size=100 ids' in capsys.readouterr().err
