"""The tasks, one in each module.

A task is a subclass of `train.engine.task.Task`. A model names its task; see
`models.model.ModelConfig.task`.
"""

TASKS = {
  'diffusion': 'train.tasks.diffusion:Diffusion',
  'language': 'train.tasks.language:LanguageModel',
  'image_classification': (
    'train.tasks.image_classification:ImageClassification'
  ),
  'text_classification': 'train.tasks.text_classification:TextClassification',
}
"""The tasks by the names that models use, each as 'module:class'."""
