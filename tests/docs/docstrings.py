"""Makes Markdown of docstrings while `make docs` builds the site."""

import importlib
import inspect
import re

import griffe

LINK = re.compile(r'`([^`<]+?)\s+<(https?://[^>]+)>`_')
"""A link of reStructuredText, which Python docstrings use."""


class Docstrings(griffe.Extension):
  """Rewrites the parts of a docstring that Markdown would show wrongly."""

  def on_object(self, *, obj, **_):
    """Rewrites the docstring of a module, class, function or attribute."""
    if obj.docstring:
      obj.docstring.value = markdown(obj.docstring.value)

  def on_package(self, *, pkg, **_):
    """Gives presets with `**options` the signatures of `inspect.signature`."""
    # The site is built without the packages that the others import.
    library = pkg.name == 'galore_optax'
    functions = list(functions_of(pkg)) if library else []
    for func in functions:
      if any(map(is_rest, func.parameters)):
        module = importlib.import_module(func.parent.path)
        found = inspect.signature(getattr(module, func.name)).parameters
        near = [x for x in functions if x.parent is func.parent and x != func]
        core = [x for x in functions if x.path == 'galore_optax.galore.galore']
        named = [
          parameter(name, found[name].default, [func, *near, *core])
          for name in found
          if name not in func.parameters or not is_rest(func.parameters[name])
        ]
        # The docstring explains `**options` as a whole.
        rest = filter(is_rest, func.parameters)
        func.parameters = griffe.Parameters(*named, *rest)


def functions_of(module):
  """Yields the functions of a package, those of its modules too."""
  yield from (x for x in module.functions.values() if not x.is_alias)
  for part in module.modules.values():
    if not part.is_alias:
      yield from functions_of(part)


def is_rest(found):
  """Returns whether a parameter takes all other keywords."""
  return found.kind is griffe.ParameterKind.var_keyword


def parameter(name, default, functions):
  """Returns a parameter with the annotation of the first function that has it.

  Python's own annotations would have every alias of a type written out.
  """
  known = (f.parameters[name] for f in functions if name in f.parameters)
  like = next(known, griffe.Parameter(name))
  if default is inspect.Parameter.empty:
    return like
  return griffe.Parameter(
    name,
    annotation=like.annotation,
    kind=griffe.ParameterKind.keyword_only,
    default=repr(default),
  )


def markdown(text):
  """Returns a docstring as Markdown with the sections of Google's style."""
  text = LINK.sub(lambda x: f'[{" ".join(x[1].split())}]({x[2]})', text)
  # Griffe recognizes only the plural name of this section.
  text = re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE)
  text = re.sub(
    r'::\n\n((?:  .*\n?|\n)+)',
    lambda x: f':\n\n```python\n{dedent(x[1])}\n```\n\n',
    text,
  )
  # Outside a section of examples, Markdown takes `>>>` for three quotations.
  return re.sub(
    r'^>>> (?:.+\n?)+',
    lambda x: f'```pycon\n{x[0].rstrip()}\n```\n',
    text,
    flags=re.MULTILINE,
  )


def dedent(block):
  """Removes two spaces from each line of a block."""
  return '\n'.join(line[2:] for line in block.rstrip().splitlines())
