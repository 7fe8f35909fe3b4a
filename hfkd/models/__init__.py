"""Models: the CIFAR networks of the literature, loading by name, students cut out of a teacher."""

from transformers import AutoConfig, AutoModelForImageClassification

from hfkd.models.cut import student_from_teacher
from hfkd.models.loading import load_model, load_teacher
from hfkd.models.modeling_cifar import MODEL_NAMES, CifarConfig, CifarForImageClassification


__all__ = [
    "MODEL_NAMES",
    "CifarConfig",
    "CifarForImageClassification",
    "load_model",
    "load_teacher",
    "student_from_teacher",
]

# The first pair lets the Auto classes load our checkpoints once hfkd is imported; the second writes the modelling file
# beside the weights, for those who have no hfkd and pass trust_remote_code=True.
AutoConfig.register(CifarConfig.model_type, CifarConfig)
AutoModelForImageClassification.register(CifarConfig, CifarForImageClassification)
CifarConfig.register_for_auto_class()
CifarForImageClassification.register_for_auto_class("AutoModelForImageClassification")
