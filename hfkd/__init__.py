"""A small, fast model taught by a big one: knowledge distillation on ``transformers.Trainer``."""

from hfkd import models as models  # registers our architectures with the Auto classes
from hfkd.distillers import Distiller, ModelOutputs
from hfkd.teacher import TeacherEnsemble
from hfkd.trainer import DistillationTrainer
from hfkd.training_args import DistillationTrainingArguments


__version__ = "0.1.0"
__all__ = ["DistillationTrainer", "DistillationTrainingArguments", "Distiller", "ModelOutputs", "TeacherEnsemble"]
