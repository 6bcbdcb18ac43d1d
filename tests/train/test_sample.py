"""Sampling: the distribution of tokens, and the context they depend on."""

import functools
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import huggingface
from models.llama import Layers, LlamaConfig
from tests.train import glue
from tests.train.data import tiny
from train.data.tokenizer import load
from train.tasks import text_sampling as sample
from train.tasks.text_model import opened
from train.tasks.text_sampling import (
  Choice,
  Reader,
  candidates,
  choose,
  continuations,
)

CONFIG = LlamaConfig(
  vocab_size=400,
  width=16,
  mlp_width=24,
  num_heads=4,
  num_kv_heads=2,
  num_layers=2,
)
GREEDY = Choice(temperature=0.0)


@pytest.fixture(scope='module')
def model():
  """Returns a model whose next token depends on its whole context."""
  layers = Layers(CONFIG)
  params = jax.jit(layers.init)(jax.random.key(3))
  return layers, jax.tree.map(
    lambda w: 20 * w if w.ndim > 1 else w, jax.device_get(params)
  )


@pytest.fixture(scope='module')
def directory(model, tmp_path_factory):
  """Saves the model as a transformers directory with a chat template."""
  path = tmp_path_factory.mktemp('directory')
  huggingface.save(path, *(model[0].config, model[1]))
  return tiny.write(path, tiny.CHATML)


# Probabilities of four tokens.
P = np.array([0.1, 0.5, 0.15, 0.25])


@pytest.mark.parametrize(
  'choice, expected',
  [
    (Choice(1.0, 4, 1.0), P),
    (Choice(1.0, 400, 1.0), P),
    # A temperature of 2 takes square roots of probabilities, and 0.5 squares.
    (Choice(2.0, 4, 1.0), np.sqrt(P)),
    (Choice(0.5, 4, 1.0), P**2),
    (Choice(1.0, 2, 1.0), P * [0, 1, 0, 1]),
    # Top-p 0.8 needs three tokens, since 0.5 + 0.25 is less and the third makes
    # 0.9.
    (Choice(1.0, 4, 0.8), P * [0, 1, 1, 1]),
    (Choice(1.0, 4, 0.74), P * [0, 1, 0, 1]),
    (Choice(1.0, 4, 0.3), [0, 1, 0, 0]),
    (Choice(1.0, 4, 1e-9), [0, 1, 0, 0]),
    # Top-p applies after top-k, which leaves probabilities of 2/3 and 1/3.
    (Choice(1.0, 2, 0.66), [0, 1, 0, 0]),
    (Choice(1.0, 2, 0.67), P * [0, 1, 0, 1]),
    # Top-p applies after the temperature, which raises the largest probability
    # to 0.72.
    (Choice(0.5, 4, 0.7), [0, 1, 0, 0]),
    (Choice(1e-30, 4, 1.0), [0, 1, 0, 0]),
  ],
)
def test_candidates_have_the_known_distribution(choice, expected):
  # Adding a constant to a row's logits does not change its distribution.
  logits_BV = jnp.float32(np.stack([np.log(P), np.log(P) + 7]))
  scores_BK, ids_BK = candidates(logits_BV, choice)
  found_BV = np.zeros((2, 4))
  p_BK = jax.nn.softmax(scores_BK, axis=-1)
  np.put_along_axis(found_BV, np.asarray(ids_BK), np.asarray(p_BK), axis=1)
  expected = np.array(expected) / np.sum(expected)
  np.testing.assert_allclose(found_BV, [expected] * 2, atol=1e-6)
  np.testing.assert_array_equal(found_BV > 0, [expected > 0] * 2)


def test_tokens_are_drawn_as_often_as_they_are_likely():
  logits_BV = jnp.float32(np.tile(np.log(P), (20_000, 1)))
  tokens_B = choose(logits_BV, jax.random.key(0), choice=Choice(1.0, 4, 0.8))
  found = np.bincount(tokens_B, minlength=4) / 20_000
  # The tolerance is four standard errors of a share of 20,000 draws.
  np.testing.assert_allclose(found, P * [0, 1, 1, 1] / 0.9, atol=0.015)
  assert found[0] == 0
  best_B = choose(logits_BV[:3], jax.random.key(0), choice=GREEDY)
  np.testing.assert_array_equal(best_B, 1)


@functools.cache
def whole(layers):
  return jax.jit(layers.logits)


def best(layers, params, row, length=192):
  """Returns the most likely token after a row, by a pass without a cache."""
  # Pad to one length, so that the model is compiled once. Later tokens do not
  # affect earlier ones.
  batch = {
    'inputs': np.int32([row + (length - len(row)) * [0]]),
    'positions': np.arange(length, dtype=np.int32)[None],
    'segments': np.zeros((1, length), np.int32),
  }
  return int(jnp.argmax(whole(layers)(params, batch)[0, len(row) - 1]))


@pytest.mark.parametrize(
  'window', [pytest.param(7, marks=pytest.mark.slow), 64]
)
def test_the_window_slides_by_half(model, window):
  prompts = [[5, 9, 300], [7], list(range(20, 30))]
  steps = sample.stream(
    Reader(*model), prompts, window=window, num_tokens=9, choice=GREEDY
  )
  found = list(zip(*steps, strict=True))
  for prompt, said in zip(prompts, found, strict=True):
    row, expected = prompt[-window:], []
    for _ in range(9):
      expected.append(best(*model, row))
      row = [*row, expected[-1]]
      row = row if len(row) <= window else row[-3:]
    assert list(said) == expected
    # The outputs must vary, or the comparison would prove little.
    assert len(set(expected)) > 3


def test_prompts_longer_than_a_chunk(model, monkeypatch):
  monkeypatch.setattr(sample, 'CHUNK', 16)
  rng = np.random.default_rng(0)
  prompts = [rng.integers(400, size=n).tolist() for n in (50, 3, 33)]
  (step,) = sample.stream(
    Reader(*model), prompts, window=64, num_tokens=1, choice=GREEDY
  )
  assert step == [best(*model, row) for row in prompts]


def test_a_reader_goes_on_from_the_tokens_in_its_cache(model, monkeypatch):
  reader, sizes = Reader(*model), []
  extend = sample._extend
  monkeypatch.setattr(
    sample, '_extend', lambda *x: sizes.append(x[3].shape) or extend(*x)
  )
  rng = np.random.default_rng(1)
  row = rng.integers(400, size=40).tolist()
  rows = [row[:30], row[:31], row[:31], [*row[:20], 7, *row[20:35]], row[:1]]
  for one in rows:
    logits_BV = reader.read([one], 64)
    assert int(jnp.argmax(logits_BV)) == best(*model, one)
  assert sizes == [(1, 32), (1, 1), (1, 1), (1, 16), (1, 1)]
  # A window larger than the cache makes the reader start again from the
  # beginning.
  assert int(jnp.argmax(reader.read([row], 128))) == best(*model, row)
  assert sizes[-1] == (1, 64)


def test_a_row_depends_on_no_other_row(model, directory):
  tokenizer = load(directory)
  prompts = ['The quick', 'Line 7 of many', 'dog']
  # Other tests compile the same programs, of this window.
  options = {'window': 64, 'num_tokens': 20, 'top_k': 400}
  together = continuations(*model, tokenizer, prompts, **options)
  assert len(set(together)) == 3
  for count in (1, 2):
    some = continuations(*model, tokenizer, prompts[:count], **options)
    assert some == together[:count]
  other = continuations(*model, tokenizer, prompts, **options, seed=1)
  assert other != together


def test_output_ends_before_a_stop_string(model, directory):
  tokenizer = load(directory)
  options = {'window': 64, 'num_tokens': 30, 'temperature': 0.0}
  prompts = ['The quick', 'dog']
  whole = continuations(*model, tokenizer, prompts, **options)
  end = whole[0][5:8]
  found = continuations(*model, tokenizer, prompts, **options, stop=[end, 'Q!'])
  expected = [x[: x.index(end)] if end in x else x for x in whole]
  assert found == expected != whole


def test_a_stop_id_ends_a_row_and_no_other(model):
  prompts = [[5, 9, 300], [7]]
  options = {'window': 64, 'num_tokens': 12, 'choice': GREEDY}
  steps = list(sample.stream(Reader(*model), prompts, **options))
  first, other = zip(*steps, strict=True)
  stop = next(x for x in first if x not in other)
  at = first.index(stop)
  found = sample.stream(Reader(*model), prompts, **options, stop_ids=[1, stop])
  expected = [list(x) for x in steps]
  for step in expected[at:]:
    step[0] = None
  assert list(found) == expected
  # The stream stops once all rows have ended.
  at = next(
    n
    for n in range(1, 12)
    if {first[n], other[n]}.isdisjoint({*first[:n], *other[:n]})
  )
  ends = {first[at], other[at]}
  found = sample.stream(Reader(*model), prompts, **options, stop_ids=ends)
  assert list(found) == [list(x) for x in steps[:at]]


def test_a_word_begins_with_its_space(tmp_path):
  tokenizer = load(tiny.write_other(tmp_path, 'metaspace'))
  prompt, said = (tokenizer.encode(x).tolist() for x in ('The', 'dog'))
  assert tokenizer.decode(said) == 'dog'
  assert sample.spoken(tokenizer, prompt, said, []) == (' dog', False)
  assert sample.spoken(tokenizer, prompt, said, ['o', 'd']) == (' ', True)


def test_no_part_of_a_character_is_shown(directory):
  tokenizer = load(directory)
  ids = tokenizer.encode('caf\u00e9 \U0001f600!').tolist()
  shown = ''
  for n in range(1, len(ids) + 1):
    text, _ = sample.spoken(tokenizer, [], ids[:n], [])
    settled = sample.settled(text, [])
    assert settled.startswith(shown) and '\ufffd' not in settled
    shown = settled
  assert shown == 'caf\u00e9 \U0001f600!'


def talk(monkeypatch, capsys, path, typed, *options):
  monkeypatch.setattr(sys, 'stdin', io.StringIO(typed))
  sample.main([str(path), '--chat', *options])
  return capsys.readouterr().out


def test_a_chat_equals_reading_the_whole_conversation(
  directory, monkeypatch, capsys
):
  model = opened(directory)
  lines = ['Who jumps over the dog?', 'And then?', 'caf\u00e9']
  out = talk(
    *(monkeypatch, capsys, directory, '\n\n'.join(lines) + '\n'),
    *('--temperature', '0', '--num-tokens', '12'),
  )
  messages, expected = [], ''
  for line in lines:
    messages.append({'role': 'user', 'content': line})
    prompt = sample.rendered(model.tokenizer, messages)
    row, said = list(prompt), []
    while len(said) < 12:
      token = best(model.layers, model.params, row)
      if token in model.tokenizer.stop_ids:
        break
      row, said = [*row, token], [*said, token]
    text, _ = sample.spoken(model.tokenizer, prompt, said, [])
    expected += f'{text}\n'
    messages.append({'role': 'assistant', 'content': text})
  assert out == expected and len(expected) > 30


def test_a_chat_forgets_messages_that_do_not_fit(directory, monkeypatch):
  model = opened(directory)._replace(window=48)
  seen, stream = [], sample.stream

  def recorded(reader, prompts, **options):
    seen.append(prompts[0])
    return stream(reader, prompts, **options)

  monkeypatch.setattr(sample, 'stream', recorded)
  lines = ['one', 'two', 'three', 'four']
  list(sample.chat(model, lines, num_tokens=8, choice=GREEDY))
  assert len(seen) == 4
  texts = [model.tokenizer.decode(ids) for ids in seen]
  assert all(line in text for line, text in zip(lines, texts, strict=True))
  assert all(len(ids) <= 40 for ids in seen)
  assert 'one' in texts[0] and 'one' not in texts[3]


def test_a_chat_needs_a_template(model, tmp_path, monkeypatch, capsys):
  huggingface.save(tmp_path, model[0].config, model[1])
  tiny.write(tmp_path)
  with pytest.raises(SystemExit):
    talk(monkeypatch, capsys, tmp_path, 'hello\n')
  assert '--chat needs a model with a chat template' in capsys.readouterr().err


def test_a_chat_has_variables(model, tmp_path, monkeypatch, capsys):
  huggingface.save(tmp_path, model[0].config, model[1])
  tiny.write(tmp_path, tiny.THINK_OR_NOT)
  seen, stream = [], sample.stream

  def recorded(reader, prompts, **options):
    seen.append(load(tmp_path).decode(prompts[0]))
    return stream(reader, prompts, **options)

  monkeypatch.setattr(sample, 'stream', recorded)
  options = ['--template-variables', 'enable_thinking=false']
  for some in ([], options):
    talk(monkeypatch, capsys, tmp_path, 'one\n', '--num-tokens', '2', *some)
  assert [text.endswith('<think>\n\n</think>\n\n') for text in seen] == [0, 1]
  for args, message in (
    (['--chat', options[0], 'thinkin=1'], "does not read 'thinkin'"),
    (['--prompt', 'a', *options], '--template-variables are of --chat'),
  ):
    with pytest.raises(SystemExit):
      sample.main([str(tmp_path), *args])
    assert message in capsys.readouterr().err


def test_prompts_of_a_directory(directory, capsys):
  args = [str(directory), '--prompt', 'The quick', '--prompt', 'dog']
  sample.main([*args, '--num-tokens', '6', '--top-p', '0.9'])
  first, second = capsys.readouterr().out.split('\n---\n')
  assert first.startswith('The quick') and second.startswith('dog')
  assert len(first) > 12 and len(second) > 4


def test_one_step_is_compiled_for_all_tokens(model):
  rows = [list(range(5, 25)), [3]]
  before = sample._extend._cache_size()
  layers = Layers(CONFIG, lambda tree: tree)
  options = {'window': 64, 'choice': GREEDY}
  for num_tokens in (20, 30):
    reader = Reader(layers, model[1])
    list(sample.stream(reader, rows, num_tokens=num_tokens, **options))
  # One program is compiled for the prompts' 32 tokens, and one for single
  # tokens.
  assert sample._extend._cache_size() == before + 2


@pytest.mark.slow
def test_an_encoder_writes_nothing(tmp_path, capsys):
  glue.roberta(tmp_path)
  with pytest.raises(SystemExit):
    sample.main([str(tmp_path), '--prompt', 'dog'])
  err = capsys.readouterr().err
  assert 'must hold a model that writes text, got EncoderConfig' in err
